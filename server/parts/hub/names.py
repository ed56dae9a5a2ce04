"""Names of models on Hugging Face's hub, as other programs spell them too, and the files that they mean.

Short names are spelled as in Ollama: family:tag. Repositories and number formats are as of 2026-11-27. A repository of
the model's publisher or of llama.cpp's (ggml-org) is preferred to those of others. Which file has the number format is
looked up in the repository, so that a file may be renamed. Sampling is what the model's card recommends, where it does.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import NamedTuple

from engine.config.huggingface import PICKLE_SUFFIXES
from server.settings.setting import did_you_mean

GGUF_SUFFIX = ".gguf"
MAX_PATH_LENGTH = 1024
# The end of a file name without suffix, or of one of Ollama's tags.
NUMBER_FORMAT = r"(?:UD-)?(?:I?Q\d\w{0,16}|TQ\d\w{0,16}|(?:MX|NV)FP4\w{0,16}|BF16|F16|FP16|F32|FP32)"

_ADDRESS = re.compile(r"(hf|https?)://|(huggingface|hf)\.co/", re.IGNORECASE)
_WWW = re.compile(r"^(https?://)?www\.", re.IGNORECASE)
_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<choice>[\w./+-]+))?", re.ASCII
)


class HubError(Exception):
    """A model on the hub that cannot be found or downloaded. The message is one line for the user."""


class HubName(NamedTuple):
    """A model on the hub: a repository, and which of its files if it has several models."""

    repo: str  # org/name
    revision: str | None = None  # branch, tag or commit; None: main
    file: str | None = None  # path of a GGUF file in the repository
    tag: str | None = None  # number format of the GGUF file, such as Q4_K_M

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        choice = self.file or self.tag
        return f"{self.repo}{revision}{f':{choice}' if choice else ''}"


def parse_hub_name(text: str) -> HubName | None:
    """Parse `org/name[@revision][:tag or file]`, or an address. Return None for a text that is neither.

    Raises HubError for an address that is not that of a model on the hub.
    """
    address = _WWW.sub(r"\1", text)
    name = _parse_address(address) if _ADDRESS.match(address) else _parse_id(text)
    revision = name and name.revision
    if revision is not None and (not is_inside(revision) or ".." in revision):  # which Git does not allow either
        raise HubError(f"{revision!r} is not the name of a branch, tag or commit")
    return name


def is_inside(path: str) -> bool:
    """Return whether a relative path stays inside its folder, and can be shown."""
    is_short = len(path) <= MAX_PATH_LENGTH
    return is_short and path.isprintable() and not any(part in ("", ".", "..") for part in path.split("/"))


def _parse_id(text: str) -> HubName | None:
    match = _ID.fullmatch(text)
    if match is None:
        return None
    name, choice = HubName(match["repo"], match["revision"]), match["choice"]
    if choice is None or choice == "latest":
        return name
    if choice.lower().endswith(GGUF_SUFFIX):
        return name._replace(file=choice)
    return name._replace(tag=choice) if "/" not in choice else None


def _parse_address(text: str) -> HubName:
    """Parse the address of a repository, a folder or a file, or that of a repository with `:tag`. Raises HubError."""
    from huggingface_hub import constants, parse_hf_uri

    address, _, choice = text.rpartition(":")
    is_tagged = "/" in address and "/" not in choice
    problem = HubError(
        f"{text!r} names no model on Hugging Face (HF_ENDPOINT names a mirror): give org/name, org/name:TAG or "
        "org/name:file.gguf, or download the file and give its path"
    )
    try:
        uri = parse_hf_uri(address if is_tagged else text, constants.ENDPOINT)
    except ValueError:
        raise problem from None
    if uri.type != "model":
        raise HubError(f"{text!r} is not a model: it is under {uri.type}s")
    name, path = _parse_id(f"{uri.id}:{choice if is_tagged else 'latest'}"), uri.path_in_repo
    if name is None or (is_tagged and path):
        raise problem
    name = name._replace(revision=uri.revision)
    if not path:
        return name
    if path.lower().endswith(GGUF_SUFFIX):
        return name._replace(file=path)
    if "/tree/" in text:  # a folder, which is named after the number format of its files
        return name._replace(tag=path.rpartition("/")[2])
    raise HubError(f"{path} is not a GGUF file: for a model in safetensors, give the repository, {name.repo}")


Sampling = Mapping[str, float]


class HubModel(NamedTuple):
    """A model on the hub."""

    name: str | None  # the short name, family:tag; None: its name in the API is that of the file or folder
    source: HubName
    card_sampling: Sampling


_NONE: Sampling = {}
_QWEN3: Sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
_QWEN3_INSTRUCT: Sampling = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
_QWEN3_CODER: Sampling = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
_GEMMA: Sampling = {"temperature": 1.0, "top_p": 0.95, "top_k": 64, "min_p": 0.0}
_DEEPSEEK_R1: Sampling = {"temperature": 0.6, "top_p": 0.95}
_DEVSTRAL: Sampling = {"temperature": 0.15}
_SMOLLM3: Sampling = {"temperature": 0.6, "top_p": 0.95}
_GLM: Sampling = {"temperature": 1.0, "top_p": 0.95}

# The first tag of a family is what the family's name alone means.
_TABLE: tuple[tuple[str, str, Sampling], ...] = (
    ("qwen3:8b", "Qwen/Qwen3-8B-GGUF:Q4_K_M", _QWEN3),
    ("qwen3:0.6b", "Qwen/Qwen3-0.6B-GGUF:Q8_0", _QWEN3),
    ("qwen3:1.7b", "Qwen/Qwen3-1.7B-GGUF:Q8_0", _QWEN3),
    ("qwen3:4b", "Qwen/Qwen3-4B-GGUF:Q4_K_M", _QWEN3),
    ("qwen3:14b", "Qwen/Qwen3-14B-GGUF:Q4_K_M", _QWEN3),
    ("qwen3:30b", "Qwen/Qwen3-30B-A3B-GGUF:Q4_K_M", _QWEN3),
    ("qwen3:32b", "Qwen/Qwen3-32B-GGUF:Q4_K_M", _QWEN3),
    ("qwen3:4b-instruct", "unsloth/Qwen3-4B-Instruct-2507-GGUF:Q4_K_M", _QWEN3_INSTRUCT),
    ("qwen3-coder:30b", "unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF:Q4_K_M", _QWEN3_CODER),
    ("qwen2.5:7b", "Qwen/Qwen2.5-7B-Instruct-GGUF:Q4_K_M", _NONE),
    ("qwen2.5-coder:7b", "Qwen/Qwen2.5-Coder-7B-Instruct-GGUF:Q4_K_M", _NONE),
    ("qwen2.5-coder:1.5b", "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF:Q4_K_M", _NONE),
    ("gemma2:2b", "bartowski/gemma-2-2b-it-GGUF:Q4_K_M", _NONE),
    ("gemma3:4b", "ggml-org/gemma-3-4b-it-GGUF:Q4_K_M", _GEMMA),
    ("gemma3:1b", "ggml-org/gemma-3-1b-it-GGUF:Q4_K_M", _GEMMA),
    ("gemma3:12b", "ggml-org/gemma-3-12b-it-GGUF:Q4_K_M", _GEMMA),
    ("gemma3:27b", "ggml-org/gemma-3-27b-it-GGUF:Q4_K_M", _GEMMA),
    ("gemma3:1b-it-qat", "ggml-org/gemma-3-1b-it-qat-GGUF:Q4_0", _GEMMA),
    ("gemma3:4b-it-qat", "ggml-org/gemma-3-4b-it-qat-GGUF:Q4_0", _GEMMA),
    ("gemma4:e4b", "ggml-org/gemma-4-E4B-it-GGUF:Q4_0", _GEMMA),
    ("gemma4:e2b", "ggml-org/gemma-4-E2B-it-GGUF:Q4_0", _GEMMA),
    ("gemma4:26b", "ggml-org/gemma-4-26B-A4B-it-GGUF:Q4_0", _GEMMA),
    ("gemma4:31b", "ggml-org/gemma-4-31B-it-GGUF:Q4_0", _GEMMA),
    ("gpt-oss:20b", "ggml-org/gpt-oss-20b-GGUF:MXFP4", _NONE),
    ("gpt-oss:120b", "ggml-org/gpt-oss-120b-GGUF:MXFP4", _NONE),
    ("llama3.2:3b", "bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M", _NONE),
    ("llama3.2:1b", "bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M", _NONE),
    ("llama3.1:8b", "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF:Q4_K_M", _NONE),
    ("mistral:7b", "bartowski/Mistral-7B-Instruct-v0.3-GGUF:Q4_K_M", _NONE),
    ("ministral-3:8b", "mistralai/Ministral-3-8B-Instruct-2512-GGUF:Q4_K_M", _NONE),
    ("ministral-3:3b", "mistralai/Ministral-3-3B-Instruct-2512-GGUF:Q4_K_M", _NONE),
    ("devstral:24b", "mistralai/Devstral-Small-2507_gguf:Q4_K_M", _DEVSTRAL),
    ("devstral-small-2:24b", "unsloth/Devstral-Small-2-24B-Instruct-2512-GGUF:Q4_K_M", _DEVSTRAL),
    ("phi4:14b", "bartowski/phi-4-GGUF:Q4_K_M", _NONE),
    ("phi4-mini:3.8b", "unsloth/Phi-4-mini-instruct-GGUF:Q4_K_M", _NONE),
    ("olmo2:7b", "allenai/OLMo-2-1124-7B-Instruct-GGUF:Q4_K_M", _NONE),
    ("olmo-3:7b", "unsloth/Olmo-3-7B-Instruct-GGUF:Q4_K_M", _NONE),
    ("smollm3:3b", "ggml-org/SmolLM3-3B-GGUF:Q4_K_M", _SMOLLM3),
    ("granite3.3:8b", "ibm-granite/granite-3.3-8b-instruct-GGUF:Q4_K_M", _NONE),
    ("granite4:micro", "ibm-granite/granite-4.0-micro-GGUF:Q4_K_M", _NONE),
    ("deepseek-r1:8b", "unsloth/DeepSeek-R1-0528-Qwen3-8B-GGUF:Q4_K_M", _DEEPSEEK_R1),
    ("deepseek-r1:1.5b", "unsloth/DeepSeek-R1-Distill-Qwen-1.5B-GGUF:Q4_K_M", _DEEPSEEK_R1),
    ("deepseek-r1:7b", "unsloth/DeepSeek-R1-Distill-Qwen-7B-GGUF:Q4_K_M", _DEEPSEEK_R1),
    ("glm-4.7-flash:30b", "unsloth/GLM-4.7-Flash-GGUF:Q4_K_M", _GLM),
)


def _make_alias(name: str, model: str, card_sampling: Sampling) -> HubModel:
    parsed = parse_hub_name(model)
    assert parsed is not None, model
    return HubModel(name, parsed, card_sampling)


MODEL_ALIASES = {row[0]: _make_alias(*row) for row in _TABLE}

_LIBRARY = re.compile(r"^(ollama://|(https?://)?(registry\.)?ollama\.(ai|com)/)?(library/)?", re.IGNORECASE)
_USUAL_VARIANTS = re.compile(r"[-_](it|instruct|chat|text)\b")  # tuned for chats, as all of these are
_FORMAT_AT_END = re.compile(rf"(^|[-_])(?P<format>{NUMBER_FORMAT})$", re.IGNORECASE)


def families() -> dict[str, list[str]]:
    """Return the tags of each family."""
    found: dict[str, list[str]] = {}
    for name in MODEL_ALIASES:
        family, _, tag = name.partition(":")
        found.setdefault(family, []).append(tag)
    return found


def _size(tag: str) -> tuple[float, str]:
    """Return a key to sort tags by the number of parameters that they begin with."""
    number = re.match(r"[a-z]*([\d.]+)b", tag)
    return float(number[1]) if number else 0.0, tag


def find_alias(text: str) -> HubModel | None:
    """Return the alias that a spelling of Ollama means: `qwen3`, `qwen3:latest`, `library/gemma3:1b-it-q4_K_M`.

    A number format at the end of the tag replaces that of the alias. Return None if the family is not known. Raises
    HubError if it is, but has no such tag.
    """
    family, _, tag = _LIBRARY.sub("", text).lower().partition(":")
    if not (tags := families().get(family)):
        return None
    number_format = _FORMAT_AT_END.search(tag)
    size = tag[: number_format.start()] if number_format else tag
    size = tags[0] if size in ("", "latest") else size
    found = next((name for name in (size, _USUAL_VARIANTS.sub("", size)) if name in tags), None)
    if found is None:
        raise HubError(f"there is no {tag}; {family} comes as {', '.join(sorted(tags, key=_size))}")
    alias = MODEL_ALIASES[f"{family}:{found}"]
    if number_format is None:
        return alias
    asked = number_format["format"].upper()
    return alias._replace(name=f"{alias.name}-{asked.lower()}", source=alias.source._replace(tag=asked))


CONFIG = "config.json"
FOLDER_PATTERNS = ("*.json", "*.jinja", "tokenizer.model*", "*.tiktoken", "merges.txt", "vocab.txt")  # and the weights

# GGUF files that are not a model: what llama.cpp loads beside one.
_COMPANION = re.compile(r"mmproj|imatrix|(^|[-._])(mtp|eagle3|dflash|dspark)[-._]", re.IGNORECASE)
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_FORMAT = re.compile(rf"(?:^|[-._])(?P<format>{NUMBER_FORMAT})$", re.IGNORECASE)

# The number format to choose where none is named: small, and close to the quality of 16 bits.
PREFERRED_FORMATS = (
    *("Q4_K_M", "UD-Q4_K_XL", "Q4_0", "MXFP4", "Q4_K_S", "Q4_1", "IQ4_NL", "IQ4_XS", "Q5_K_M", "Q5_0"),
    *("Q6_K", "Q8_0", "Q3_K_M", "BF16", "F16", "F32"),
)

MAX_NAMED = 24  # files or formats in an error message


class GGUFModel(NamedTuple):
    """A model in one GGUF file, or in several parts."""

    stem: str  # path without suffix and number of the part
    num_parts: int  # 0: a single file
    paths: tuple[str, ...]  # in order

    @property
    def number_format(self) -> str:
        """The number format by the name of the file, in capitals, or "" if it names none."""
        match = _FORMAT.search(self.stem.rpartition("/")[2])
        return match["format"].upper().replace("FP16", "F16").replace("FP32", "F32") if match else ""

    def has_tag(self, tag: str) -> bool:
        """Return whether the name of the file or of its folder ends with the tag. Case does not matter."""
        folder, _, stem = self.stem.lower().rpartition("/")
        return re.search(rf"(?:^|[-.]){re.escape(tag.lower())}$", stem) is not None or folder == tag.lower()


def select_files(paths: Sequence[str], name: HubName) -> tuple[str, ...]:
    """Return the files of a model: all parts of a GGUF file with the first part first, or those of a safetensors model.

    Raises HubError, which says what the repository has instead.
    """
    if name.file or name.tag:
        return select_gguf(paths, name).paths
    if CONFIG in paths and any(_is_top_safetensors(path) for path in paths):
        return _safetensors_files(paths)
    if gguf_models(paths):
        return select_gguf(paths, name).paths
    if any(path.endswith(PICKLE_SUFFIXES) for path in paths):
        raise HubError(
            "the repository has only pickle files, which can run code when read; choose one with safetensors"
        )
    raise HubError(f"the repository has no model in safetensors (with {CONFIG}), and no GGUF file")


def select_gguf(paths: Sequence[str], name: HubName) -> GGUFModel:
    """Return the GGUF model that the file or the tag names, or a sensible one. Raises HubError."""
    models = gguf_models(paths, with_companions=name.file is not None)
    if not models:
        hint = f" (its weights are in safetensors: {name.repo})" if any(map(_is_top_safetensors, paths)) else ""
        raise HubError(f"the repository has no GGUF files{hint}")
    model = _by_file(models, name.file) if name.file else _by_tag(models, name.tag) if name.tag else _preferred(models)
    if len(model.paths) < model.num_parts:
        raise HubError(f"{model.paths[0]} is not all: {len(model.paths)} of {model.num_parts} parts are there")
    return model


def gguf_models(paths: Iterable[str], *, with_companions: bool = False) -> list[GGUFModel]:
    """Group the GGUF files of a repository into models."""
    parts: Mapping[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)
    for path in paths:
        if not path.lower().endswith(GGUF_SUFFIX) or (not with_companions and _COMPANION.search(path)):
            continue
        match = _SPLIT.fullmatch(path)
        key = (match["stem"], int(match["count"])) if match else (path[: -len(GGUF_SUFFIX)], 0)
        parts[key].append((int(match["index"]) if match else 0, path))
    return [GGUFModel(stem, count, tuple(path for _, path in sorted(found))) for (stem, count), found in parts.items()]


def _by_file(models: list[GGUFModel], file: str) -> GGUFModel:
    by_path = {path.lower(): model for model in models for path in model.paths}
    if (model := by_path.get(file.lower())) is None:
        paths = [model.paths[0] for model in models]
        raise HubError(f"the repository has no file {file}{did_you_mean(file, paths)}; it has {_enumerate(paths)}")
    return model


def _by_tag(models: list[GGUFModel], tag: str) -> GGUFModel:
    tag = {"FP16": "F16", "FP32": "F32"}.get(tag.upper(), tag)
    exact = [model for model in models if model.number_format == tag.upper()]
    if found := exact or [model for model in models if model.has_tag(tag)]:
        return _only(found, tag)
    formats = dict.fromkeys(model.number_format or model.paths[0] for model in models)
    raise HubError(f"the repository has no {tag.upper()}; it has {_enumerate(list(formats))}")


def _preferred(models: list[GGUFModel]) -> GGUFModel:
    for number_format in PREFERRED_FORMATS:
        if found := [model for model in models if model.number_format == number_format]:
            return _only(found, number_format)
    return models[0]


def _only(models: list[GGUFModel], tag: str) -> GGUFModel:
    """Return the model if all are the same one, whole and in parts; whole if possible. Raises HubError."""
    if len({model.stem.rpartition("/")[2].lower() for model in models}) > 1:
        choices = _enumerate([model.paths[0] for model in models])
        raise HubError(f"several files are {tag.upper()}; give one as org/name:file.gguf: {choices}")
    return min(models, key=lambda model: model.num_parts)


def _enumerate(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _is_top_safetensors(path: str) -> bool:
    return "/" not in path and path.endswith(".safetensors")


def _safetensors_files(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the weights, the configuration and the tokenizer in the top folder: no pickle files, no Python files.

    Mistral's repositories have the weights twice, as model*.safetensors and as consolidated*.safetensors.
    """
    weights = [path for path in paths if _is_top_safetensors(path)]
    weights = [path for path in weights if path.startswith("model")] or weights
    top = [path for path in paths if "/" not in path]
    others = [path for path in top if any(fnmatch(path, pattern) for pattern in FOLDER_PATTERNS)]
    return (*others, *weights)
