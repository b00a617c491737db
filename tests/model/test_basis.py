"""A basis file holds the principal directions of what the adapter reads, and nothing of the padding or the mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fs_fwdllm.cli.main import app
from fs_fwdllm.data.plain_text import read_plain_texts
from fs_fwdllm.errors import ConfigError, DataError
from fs_fwdllm.model import load_model, load_tokenizer
from fs_fwdllm.model.activations import Moments
from fs_fwdllm.model.basis import BasisFile, make_basis
from tests.model.tiny import save_tiny_model, tiny_config

CPU = torch.device("cpu")


def write_text(file: Path, paragraphs: int = 40) -> Path:
    rng = np.random.default_rng(5)
    lines = [" ".join(f"w{word}" for word in rng.integers(3, 100, 4 + row % 9)) for row in range(paragraphs)]
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "public.txt")


def config_of(tmp_path: Path, method: str = "output_residual", **arguments: Any) -> Any:
    folder = tmp_path / "m"
    return tiny_config(
        folder if folder.exists() else save_tiny_model(folder, "llama"), method, classifier=False, **arguments
    )


def make(config: Any, text: Path, output: Path, tokens: int = 10_000) -> BasisFile:
    return make_basis(config, text, output, CPU, tokens)


def moments_of(vectors: torch.Tensor, pieces: int = 3) -> Moments:
    moments = Moments(vectors.shape[1])
    for piece in vectors.tensor_split(pieces):
        moments.add(piece)
    return moments


def skewed(count: int = 500, width: int = 12) -> torch.Tensor:
    """Vectors around a large mean, with another spread in every direction."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(count, width, generator=generator) * torch.linspace(3.0, 0.1, width)
    return mixed @ torch.linalg.qr(torch.randn(width, width, generator=generator)).Q + 5.0


class TestRows:
    def test_features_have_no_mean_and_about_unit_variance(self) -> None:
        vectors = skewed()
        rows, share = moments_of(vectors).principal_rows(5)
        features = (vectors.double() @ rows.double().T).numpy()
        np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-5)
        covariance = np.cov(features.T, bias=True)
        np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-5)
        assert (np.diff(np.diag(covariance)) < 0).all(), "damping shrinks the rare directions"
        assert np.diag(covariance)[0] == pytest.approx(1 / 1.01, rel=1e-5)
        assert 0.5 < share < 1

    def test_they_are_those_of_a_plain_decomposition(self) -> None:
        """Singular vectors of the rows themselves, each without its part along the mean."""
        vectors = skewed().double().numpy()
        mean = vectors.mean(axis=0)
        away = (vectors - mean) - np.outer((vectors - mean) @ mean, mean) / (mean @ mean)
        _, singular, right = np.linalg.svd(away, full_matrices=False)
        values = singular**2 / len(vectors)
        expected = right[:4] / np.sqrt(values[:4] + 0.01 * values[0])[:, None]
        found, _ = moments_of(skewed()).principal_rows(4)
        signs = np.sign((expected * found.numpy()).sum(axis=1))
        np.testing.assert_allclose(found.numpy(), expected * signs[:, None], rtol=1e-4, atol=1e-5)
        assert (found[torch.arange(4), found.abs().argmax(dim=1)] > 0).all()

    def test_too_many_or_too_few(self) -> None:
        with pytest.raises(ConfigError, match="1 to 11 are left beside the mean"):
            moments_of(skewed()).principal_rows(12)
        for rank in (0, "4", True):
            with pytest.raises(ConfigError, match="1 to 11 are left beside the mean"):
                moments_of(skewed()).principal_rows(rank)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="5 rows needs more than 5 tokens; give it more text"):
            moments_of(skewed(5)).principal_rows(5)


def test_the_output_residuals_are_those_of_the_final_hidden_states(tmp_path: Path, text: Path) -> None:
    """One text at a time through plain transformers; the texts differ in length, so padding would show."""
    config = config_of(tmp_path, rank=6)
    made = make(config, text, tmp_path / "b.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tokenizer = load_tokenizer(config)
    with torch.no_grad():
        states = [
            model(**tokenizer(line, return_tensors="pt"), output_hidden_states=True).hidden_states[-1][0]
            for line in text.read_text().split("\n\n")
        ]
    expected, share = moments_of(torch.cat(states)).principal_rows(6)
    found = load_file(made.path)
    assert found.keys() == {"output_residual.down"}
    torch.testing.assert_close(found["output_residual.down"], expected, rtol=1e-3, atol=1e-4)
    assert made.places == (("output_residual.down", 6, 32, pytest.approx(share, rel=1e-3)),)
    assert made.tokens == sum(map(len, states))
    assert made.passes == 5
    with safe_open(made.path, framework="pt") as opened:
        origin = opened.metadata()
    assert (origin["adapter_method"], origin["text"], origin["tokens"]) == (
        "output_residual", "public.txt", str(made.tokens),
    )  # fmt: skip


def test_it_can_be_given_to_the_adapter(tmp_path: Path, text: Path) -> None:
    made = make(config_of(tmp_path, rank=6), text, tmp_path / "b.safetensors")
    config = config_of(tmp_path, rank=6, basis=str(made.path))
    model: Any = load_model(config, load_tokenizer(config)).model
    assert torch.equal(model.lm_head.output_residual.down, load_file(made.path)["output_residual.down"])
    make(config, text, tmp_path / "another.safetensors")  # a configuration that names one already makes another


def test_only_the_first_texts_are_looked_at(tmp_path: Path, text: Path) -> None:
    config = config_of(tmp_path, rank=6)
    assert make(config, text, tmp_path / "b.safetensors", tokens=30).tokens in range(30, 42)
    whole = make(config, text, tmp_path / "c.safetensors")
    assert whole.digest != make(config, text, tmp_path / "d.safetensors", tokens=30).digest


def test_what_is_no_basis_is_refused(tmp_path: Path, text: Path) -> None:
    config = config_of(tmp_path, rank=6)
    with pytest.raises(ConfigError, match=r"adapter_method 'ia3' takes no basis; these do: .*output_residual"):
        make(config_of(tmp_path, "ia3"), text, tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="exists already, and a run may depend on it"):
        make(config, text, text)
    with pytest.raises(DataError, match=r"nothing\.txt: does not exist"):
        make(config, tmp_path / "nothing.txt", tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="1 to 31 are left beside the mean"):
        make(config_of(tmp_path, rank=32), text, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="needs more than 4 tokens"):
        make(config, write_text(tmp_path / "short.txt", 1), tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="its folder does not exist"):
        make(config, text, tmp_path / "nowhere" / "b.safetensors")
    assert not list(tmp_path.glob("*.safetensors*"))
    assert not list(tmp_path.glob(".*"))


class TestTexts:
    def test_paragraphs_are_divided_by_blank_lines(self, tmp_path: Path) -> None:
        (file := tmp_path / "a.txt").write_text("\ufeffone\ntwo\n \n\nthree\r\nfour\n\n\n", encoding="utf-8")
        assert read_plain_texts(file, "text") == ["one two", "three four"]

    def test_rows_give_a_field_or_several(self, tmp_path: Path) -> None:
        rows = [{"a": "one", "b": "two"}, {"a": " ", "b": ""}, {"a": "three", "b": ""}]
        (file := tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert read_plain_texts(file, "a") == ["one", "three"]
        assert read_plain_texts(file, "a+b") == ["one two", "three"]
        with pytest.raises(DataError, match=r"has no field 'text' \(named by fwdllm.data.text\)"):
            read_plain_texts(file, "text")

    def test_nothing_is_refused(self, tmp_path: Path) -> None:
        (file := tmp_path / "a.txt").write_text(" \n\n \n")
        with pytest.raises(DataError, match="holds no text"):
            read_plain_texts(file, "text")


def test_the_command(tmp_path: Path, text: Path) -> None:
    save_tiny_model(tmp_path / "m", "llama")
    (file := tmp_path / "a.yaml").write_text(
        f"model: {{type: {tmp_path / 'm'}@huggingface_llm}}\n"
        "llm: {tok_len: 16, adapter: {use: true, args: [{adapter_method: output_residual, rank: 4}]}}\n"
    )
    wanted = tmp_path / "b.safetensors"
    call = ["basis", str(file), "--text", str(text), "-o", str(wanted)]
    result = CliRunner().invoke(app, call, env={"COLUMNS": "300", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert "output_residual.down  4 rows of 32, " in result.stdout
    assert f"use it with llm.adapter.args basis: {wanted}" in result.stdout
    again = CliRunner().invoke(app, call, env={"COLUMNS": "300", "NO_COLOR": "1"})
    assert again.exit_code == 2
    assert "exists already" in again.output
