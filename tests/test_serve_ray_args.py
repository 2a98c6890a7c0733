"""The config file of Ray Serve, and what its `args` may be."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the packages of comemo serve are not installed")
yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'comemo-kernels[ray]'", allow_module_level=True)

# Ray takes seconds to import, so tests do it, and not their collection.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword:DeprecationWarning")  # Ray's
CONFIG = Path(__file__).parents[1] / "examples" / "serve" / "ray.yaml"


def test_the_config_file_is_one_that_ray_reads():
    from ray.serve.schema import ServeDeploySchema

    from comemo.serve.ray_app import build

    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (app,) = config.applications
    assert app.import_path == f"{build.__module__}:{build.__name__}"
    front = build(app.args)._bound_deployment
    assert {one.name for one in app.deployments} == {front.name, "Engine"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "model must be"),
        ({"model": "nano", "modle": 1}, "did you mean model"),
        ({"model": "nano", "server": {"max_token": 1}}, "did you mean max_tokens"),
        ({"model": "nano", "server": {"keys": {}}}, "api_keys"),
        ({"model": "nano", "engine": {"answers": 0}}, "answers must be above 0"),
    ],
)
def test_wrong_args_are_named(args, words):
    from comemo.serve.ray_app import build

    with pytest.raises(ValueError, match=words):
        build(args)


def test_a_key_in_the_environment_is_needed(monkeypatch):
    from comemo.serve.ray_app import read_args

    monkeypatch.setenv("COMEMO_API_KEY", "secret")
    served, threads = read_args({"model": "nano", "threads": 2})
    assert served.server.namespace_of("secret")
    assert served.server.namespace_of(None) is None
    assert threads == 2
