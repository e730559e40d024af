"""A study from its command line to its results, in miniature."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import pytest

from sparse_attn.cli.console import UsageError


def in_miniature(study: ModuleType, settings, tmp_path: Path, *more: str) -> tuple[dict, argparse.Namespace]:
    """Runs `study` twice, the second time for nothing; what its JSON holds, and the options it ran with."""
    parser = argparse.ArgumentParser()
    study.configure(parser)
    arguments = parser.parse_args(["--quick", "--threads", "1", "--out", str(tmp_path / "out"), *more])
    assert study.execute(arguments, settings) == 0
    (file,) = (tmp_path / "out").glob("study_*_quick.json")
    result = json.loads(file.read_text())
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert study.execute(arguments, settings) == 0  # all rows are there: nothing is run again
    assert json.loads(file.read_text())["rows"] == result["rows"]
    return result, arguments


def refuses_other_settings(study: ModuleType, settings, arguments: argparse.Namespace) -> None:
    """Runs with other settings are not mixed into one file."""
    arguments.steps = settings.steps + 1
    with pytest.raises(UsageError, match="other settings"):
        study.execute(arguments, settings)


def words(folder: Path, documents: int = 1) -> list[str]:
    """Paths of texts of a few words."""
    files = [folder / f"{i}.txt" for i in range(documents)]
    for i, file in enumerate(files):
        file.write_text(" ".join(f"word{(7 * i + j * j) % 97}" for j in range(3000)))
    return list(map(str, files))


def small_model(folder: Path) -> Path:
    """A Llama of random weights and a tokenizer of 40 words, as `from_pretrained` finds them."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, **{f"w{i}": i + 1 for i in range(40)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=41,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(folder)
    return folder
