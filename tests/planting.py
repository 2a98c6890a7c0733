"""Places in a checkpoint where code, or the name of a class, is planted."""

import json
import shutil

import transformers

CODE = """
def tell(*args, **kwargs):
    open({canary!r}, "w").close()


class Planted:
    __init__ = from_pretrained = register_for_auto_class = tell


tell()
generate = tell
"""


AUTO = [name for name in dir(transformers) if name.startswith("Auto")]


CONFIGS = ("processor_config", "preprocessor_config", "video_preprocessor_config")


def auto_map(name="planted.Planted"):
    """Code for every class that transformers loads by itself."""
    return dict.fromkeys(AUTO, name) | {"AutoTokenizer": [name, name]}


def edit(directory, file, **change):
    path = directory / f"{file}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)  # it may be a hard link to the original
    path.write_text(json.dumps(content | change))


# --- where code is planted ---


def in_every_file(directory):
    """As published and more: files name our own classes, and code for them."""
    parts = json.loads((directory / "config.json").read_text())
    for name in ("llm_config", "text_config", "vision_config", "mixin_config"):
        edit(directory, "config", **{name: parts[name] | {"auto_map": auto_map()}})
    for file in ("config", "generation_config", "tokenizer_config", *CONFIGS):
        edit(directory, file, auto_map=auto_map())


def in_another_config(directory):
    """The file that transformers reads instead of config.json, for a model of another type."""
    edit(directory, "config", configuration_files=["config.0.1.json"])
    edit(directory, "config.0.1", model_type="planted", auto_map=auto_map())


def naming(file, code="planted.Planted", **classes):
    """A file names a class, unknown or of transformers, and code for all classes."""
    return lambda directory: edit(directory, file, auto_map=auto_map(code), **classes)


def in_another_repository(directory):
    shutil.copytree(directory, directory / "other")
    code = f"{directory / 'other'}--planted.Planted"
    edit(directory, "tokenizer_config", auto_map=auto_map(code), tokenizer_class="Planted")


def in_a_list(directory):
    both = ["planted.Planted", "planted.Planted"]
    edit(directory, "tokenizer_config", auto_map=both, tokenizer_class=None)


def in_generate(directory):
    (directory / "custom_generate").mkdir()
    shutil.copy(directory / "planted.py", directory / "custom_generate" / "generate.py")


def in_pipelines(directory):
    code = {"impl": "planted.Planted", "pt": ["AutoModel"], "type": "multimodal"}
    edit(directory, "config", custom_pipelines={"image-text-to-text": code})


def in_audio(file):
    def plant(directory):
        edit(directory, "config", auto_map=auto_map())
        named = {"audio_tokenizer_class": "AutoModelForTextToWaveform"}
        named |= {"audio_tokenizer_name_or_path": str(directory)}
        inside = {"audio_tokenizer": named} if file == "processor_config" else named
        edit(directory, file, **inside)

    return plant


TOKENIZER = {
    "tokenizer": naming("tokenizer_config", tokenizer_class="Planted"),
    "known-tokenizer": naming("tokenizer_config", tokenizer_class="LlamaTokenizerFast"),
    "another-repository": in_another_repository,
}


PROCESSOR = {
    "processor": naming("processor_config", processor_class="Planted"),
    "known-processor": naming("processor_config", processor_class="InternVLProcessor"),
    "audio": in_audio("processor_config"),
    "audio-file": in_audio("audio_tokenizer_config"),
}


CONFIG = {"config": in_another_config}


OF_MODEL = {"everywhere": in_every_file, "generate": in_generate, "pipelines": in_pipelines}


PASSED_OVER = {
    "tokenizers": in_a_list,
    "processor-of-text": naming("tokenizer_config", processor_class="Planted"),
    "processor-of-pictures": naming("preprocessor_config", processor_class="Planted"),
    "pictures": naming("preprocessor_config", image_processor_type="Planted"),
    "known-pictures": naming("preprocessor_config", image_processor_type="CLIPImageProcessor"),
    "features": naming("preprocessor_config", feature_extractor_type="Planted"),
    "videos": naming("video_preprocessor_config", video_processor_type="Planted"),
}


PLACES = TOKENIZER | PROCESSOR | CONFIG | OF_MODEL | PASSED_OVER
