"""The web page of the server: its files, and what it shows of a picture before any question."""

import hashlib
from importlib import resources
from typing import Any

import torch
from fastapi import APIRouter, Request, Response

import comemo_kernels as ops
from comemo.config import CoMemoConfig
from comemo.images import choose_grid, open_image

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
# Text of users and models can neither run nor load anything, whatever a browser makes of it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked about: a new release is seen at once
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_router() -> APIRouter:
    """The page at `/` and its files below `/page/`, read once; nobody needs a key for them.

    Returns:
        Routes of GET and HEAD.
    """
    router = APIRouter()
    for file in (resources.files("comemo.serve") / "page").iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            _add_file(router, path, file.read_bytes(), kind)
    return router


def _add_file(router: APIRouter, path: str, content: bytes, kind: str) -> None:
    headers = _HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def send(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}
        if headers["ETag"] in tags or "*" in tags:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    router.add_api_route(path, send, methods=["GET", "HEAD"], include_in_schema=False)


def picture_facts(
    source: bytes, config: CoMemoConfig, max_tiles: int, rope: str = "dhr"
) -> dict[str, Any]:
    """How the model sees a picture: tiles, tokens, and the position id of each token.

    Args:
        source: the bytes of a file.
        config: of the model.
        max_tiles: most tiles, the thumbnail not counted.
        rope: "dhr", where tokens of the same place share an id, or "original", where none do.

    Returns:
        `width` and `height` in pixels, upright; `cols` and `rows` of the tiles; `side`, tokens
        along the side of a tile; `thumbnail`, whether the whole picture follows as one more tile;
        `tokens` of all tiles; `ids`, a list of side * side ids for each tile, row by row as in the
        picture, from 0, the thumbnail last; `largest_id`.

    Raises:
        ValueError: not a picture, a damaged one, an unknown `rope`, or no number of tiles.
    """
    if rope not in ("dhr", "original"):
        raise ValueError(f"picture_facts: rope must be 'dhr' or 'original', got {rope!r}")
    image = open_image(source)
    least, size = min(config.min_dynamic_patch, max_tiles), config.vision_config.image_size[0]
    cols, rows = choose_grid(*image.size, least, max_tiles, size)
    side, tokens = config.side, ops.image_tokens((cols, rows), config.side, config.use_thumbnail)
    if rope == "dhr":
        ids = ops.image_position_ids(
            (cols, rows), side, config.tile_order, thumbnail=config.use_thumbnail
        )
    else:
        ids = torch.arange(tokens)
    by_tile = ids.view(-1, side, side)
    if config.ps_version == "v1":  # such tokens are in the transposed order
        by_tile = by_tile.transpose(-2, -1)
    return {
        "width": image.width,
        "height": image.height,
        "cols": cols,
        "rows": rows,
        "side": side,
        "thumbnail": len(by_tile) > cols * rows,
        "tokens": tokens,
        "ids": by_tile.flatten(1).tolist(),
        "largest_id": int(ids.max()),
    }
