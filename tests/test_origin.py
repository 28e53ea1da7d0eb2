"""Where a file says that it comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf_samples import write_gguf
from graft.ops.files.origin import address_in, url_of
from safetensors.torch import save_file

URL = "https://huggingface.co/someone/model/resolve/main/a.gguf?download=true"


def test_both_kinds_of_files(tmp_path):
    tensors = {"a.weight": (np.ones((8, 8), np.float32), "F16")}
    assert url_of(write_gguf(tmp_path / "a.gguf", tensors, "flux", {"general.repo_url": URL})) == URL
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"source_url": URL})
    assert url_of(tmp_path / "a.safetensors") == URL
    (tmp_path / "b.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name in ("b.gguf", "gone.safetensors", "c.pt"):
        assert url_of(tmp_path / name) == ""


@pytest.mark.parametrize(
    ("metadata", "url"),
    [
        ({"general.url": "https://b.c/d", "general.source.url": URL}, URL),
        ({"general.source.huggingface.repository": "a/b"}, "https://huggingface.co/a/b"),
        ({"general.url": "javascript:alert(1)", "source_url": "https://b.c"}, "https://b.c"),
        ({"general.url": "https://b.c/<img src=x>"}, ""),
        ({"general.url": "https://b.c/" + "d" * 600}, ""),
        ({"general.base_model.0.repo_url": URL}, ""),
    ],
)
def test_the_files_own_address_counts(metadata, url):
    assert address_in(metadata) == url
