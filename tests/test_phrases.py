"""What Python says to users of ComfyUI has its Chinese phrases in `web/`: reports, errors and answers on inputs.

Python writes English. Here its texts are taken from the code, with samples in the places of names and numbers, and put
into Chinese by the page's own tables. A word of English that is left is a phrase that is missing.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from graft.ops.files.contents import KINDS, TEXT_ENCODER

ROOT = Path(__file__).resolve().parent.parent
WEB = ROOT / "web"
CODE = [*(path for folder in ("kernels", "ops", "nodes") for path in sorted((ROOT / folder).rglob("*.py")))]
CODE.append(ROOT / "demo" / "pictures.py")

NOT_FOR_THE_PAGE = {
    "ops/baked.py": "of tools/make_gguf.py",
    "ops/files/checkpoint.py": "of tools/make_gguf.py",
    "ops/workflows/swap.py": "of tools/swap_workflow.py",
    "ops/files/contents.py": "pieces of sentences, which are tried whole below",
    "nodes/charts.py": "stands in a picture",
    "nodes/architectures.py": "names of models",
}
"""Files, each with the reason why a page does not show what stands in them as it stands there."""

NOT_A_PHRASE = {
    r"\b(Tensor|int|float|str|bool)[?\[\]]* \w+": "an operator's signature",
    r"blocks\.\d|embedding|_embed|^lent |^learner |^turn (from|to)$": "names of layers and of memory",
    r"^size mismatch for ": "the host's words, which `shapes.mismatches` reads",
    r"^(not installed|trial launch|modified by an inplace operation)$": "looked for in another text",
    r"^(fade in|fade out|rise and fall|three columns|three rows|four quarters)$": "choices, which a workflow saves",
    r"^(as it is|attention and MLP|all in blocks|all of the model)$": "choices, too",
    r" = 1, \* = 0$": "rules for blocks",
    r"^torch\.cat\(": "code that is looked for",
    r"^(words, picture|picture, words|(?:self-attention at )?a level of a UNet)$": "values that the code compares",
    r"clone\(\)|dequantize\(\)|^a field has no such type": "for who writes a program",
    r"^(packed weights do not begin|kernels are looked up|compiling kernels|Graft: SHA-256)": "a line in the log",
    r"^no loader is called |^this is no (workflow of|JSON)|workflow (cannot be read|is damaged)": "of a command",
    r"^(SHA-256 of model files|LoRAs by region, step or prompt work in)": "a line in the log",
    r"^int8 (rows|spare|weight|sums|product)$|, empty$|^recipe|^\nrecipe": "names of memory, of a layer, a table",
    r" \| ": "choices and types",
    r"^7 at 7$|^7 s a step$": "stands in a picture, or within another",
    r"^a red star on mint$|^The colours, shapes and grounds": "a prompt, and a tooltip",
    r"^(step |stopped by an error|\S+ after step |\S+: 7 steps, loss)": "shown while a node runs, or in a picture",
}  # fmt: skip
"""Patterns of texts, each with the reason why no report and no error has them."""

CLIP_ONLY = "a.safetensors is for a text encoder only (7 layers): connect a CLIP to LoRA Stack (Graft)"
MISFIT = "the file does not fit the model: update ComfyUI: x is [3, 4] and not [3, 4] and 7 more (/a)"
PUT = (
    "put these files into the loras folder, choose another one, or switch the row off: x (row 7), y (row 8, "
    "there is z), a (row 9, there is b and c)"
)
TRAINED_FOR = "a.safetensors: trained for Flux, model is SD3 (0 of 7 layers match), such as x"
WITHIN = {
    "the processor": "runs on the processor: the model takes 6.8 GB of 12.9 GB",
    "in the folder of ComfyUI_windows_portable":
    "faster: run pip install libgguf in the folder of ComfyUI_windows_portable and start ComfyUI again",
    "faster: run 7 install libgguf 7 and start ComfyUI again":
    "faster: run pip install libgguf with ComfyUI's Python and start ComfyUI again",
    "faster: run 7 install -U 7 7 and start ComfyUI again":
    "faster: run pip install -U triton with ComfyUI's Python and start ComfyUI again",
    "Apple's GPU": "runs on Apple's GPU: the model takes 6.8 GB of 12.9 GB",
    "an Intel GPU": "runs on an Intel GPU: the model takes 6.8 GB of 12.9 GB",
    "with ComfyUI's Python": "faster: run pip install libgguf with ComfyUI's Python and start ComfyUI again",
    "7: no message": "its kernels for Q4_K do not compile: RuntimeError: no message",
    "tensor 7, 7": "GGUF type number 7 is unknown: update Graft, or get the model in another type (tensor 7, 7)",
    "a model": "the file is no importance matrix but a model: choose a file of Save Importance or of llama-imatrix",
    "7 layer": "a: 7 layers",
    "7 layers": "a: 7/7 layers",
    "as chosen": "weights are decoded by torch code (as chosen)",
    "no tensors": "wan · 0 · no tensors · 0 B",
    "metadata entries": "the header claims 7 metadata entries in a file of 8 bytes: get it again",
    "metadata key": "the header claims a metadata key of 7 bytes: get it again",
    "tensor name": "the tensor name at byte 7 is not UTF-8: get it again",
    "a diffusion model": "this is a diffusion model, not a VAE: update Graft",
    "part 7": "the file is part 7 of 7 of a split model: update Graft",
    "one part": "the file is one part of 7 of a split model: update Graft",
    "7 is [3, 4] and not [3, 4]": MISFIT,
    " and 7 more": MISFIT,
    "7 is 7not a text encoder: 7 (7)": "this is not a text encoder: update Graft (/a)",
    "the file has 7: 7, with 7 (7)":
    "the file has no tokenizer: get a GGUF that llama.cpp's converter made from the original model, with gpt2 (/a)",
    "connect a CLIP to LoRA Stack (Graft)": CLIP_ONLY,
    "7 is for a text encoder only (7 layers): 7": CLIP_ONLY,
    "7: 7 (0 of 7 layers match), such as 7": TRAINED_FOR,
    "trained for 7, model is 7": TRAINED_FOR,
    "the file is for another version of 7":
    "a: the file is for another version of Wan (0 of 7 layers match), such as x",
    "its names are not those of 7": "a: its names are not those of Wan (0 of 7 layers match), such as x",
    "merged into a decoded copy of the weight": "7 layers merged into a decoded copy of the weight: x",
    "next to the quantized weights": "  kohya names; 7 layers next to the quantized weights",
    "patched by ComfyUI": "7 layers patched by ComfyUI",
    "7 layers 7": "7 layers next to the quantized weights",
    "7 layers 7: 7": "7 layers next to the quantized weights: x",
    "rank 7": "a: DoRA, rank 7",
    "rank 7 to 7": "a: DoRA, rank 7 to 7",
    "by 7 7": "by share 0 = 1, by step 0 = 1, by sigma 0 = 1",
    "for the 7 prompt": "for the positive prompt, for the negative prompt",
    "7 cannot be read (7): write it as JSON, like 7": "more_rows cannot be read ([): write it as JSON, like [7]",
    "row 7": PUT,
    ", there is 7": PUT,
    ", the same file by its SHA-256": "a is here for b, the same file by its SHA-256",
    "there is 7": "a is not there, there is b and c: choose that, or put a into the loras folder",
    "7 is not there, 7: choose that, or put 7 into 77":
    "a is not there, there is b: choose that, or put a into the vae folder",
    "change in what layers give, as calibrated": "lost by rank 7: 7% of the change in what layers give, as calibrated",
    "lost by rank 7: 7 of the 7": "lost by rank 7: 7% of the change",
    "7 pictures, 7 steps, 7": "7 pictures, 7 steps, 0.35 s a step",
}  # fmt: skip
"""Pieces, each in a text in which it is told."""

NAMES = {
    *("Graft", "Triton", "Windows", "Linux", "Git", "Wan", "wan", "Mistral", "Raylight", "Lens", "Boogu", "Lumina"),
    *("Ideogram", "Flux", "Latent", "torch", "libgguf", "pip", "install", "safetensors", "pickle", "zip", "checkpoint"),
    *("imatrix", "loras", "checkpoints", "vae", "kohya", "tekken", "token", "alpha", "key", "value", "connectors"),
    *("hooks", "mmproj", "Redux", "Python", "python", "true", "false", "None", "neon", "blueprint", "linocut"),
    *("single", "double", "triton", "Stable", "Cascade", "Audio", "Diffusion", "Kandinsky", "Krea", "Anima", "Lion"),
    *("lora", "strength", "sigma", "cpu", "flux", "llama", "Apple", "Intel"),
}
"""Words that are the same in Chinese."""

WHOLE = {
    "Wan 2.1 · 4.9M · Q8_0 45 · 4.7 MB · bfloat16 · cpu · the file has no vae · with vace.gguf":
    "Wan 2.1 · 4.9M · Q8_0 45 · 4.7 MB · bfloat16 · cpu · 文件里没有 vae · 带有 vace.gguf",
    "made by Graft: Q4_K_M · of flux.safetensors · with style.safetensors ×1 · rules *.qkv = Q6_K · with an "
    "importance matrix":
    "由 Graft 制作：Q4_K_M · 来自 flux.safetensors · 带有 style.safetensors ×1 · 规则 *.qkv = Q6_K · "
    "使用了重要性矩阵",
    "a.safetensors ×0.80: 3/4 layers, rank 4 to 16; 1 left out, such as x: Q9 on an embedding, and there is no "
    "host that knows it: leave it out":
    "a.safetensors ×0.80: 3/4 层，秩 4 到 16；1 个没有使用，例如 x: Q9 在词嵌入上，而这里没有程序能处理它："
    "请不要使用它",
    "  everywhere":
    "  始终作用于整个画面",
    "flux is not a text encoder: use a loader for diffusion models (/a)":
    "flux 不是文本编码器：请使用扩散模型的加载器 (/a)",
    "the file is no importance matrix but a model: choose a file of Save Importance or of llama-imatrix (/a)":
    "文件不是重要性矩阵，而是模型：请选择“保存重要性矩阵（Graft）”或 llama-imatrix 的文件 (/a)",
    "the file is no importance matrix but empty: choose a file of Save Importance or of llama-imatrix (/a)":
    "文件不是重要性矩阵，而是空文件：请选择“保存重要性矩阵（Graft）”或 llama-imatrix 的文件 (/a)",
    "the header claims 7 tensors in a file of 8 bytes: the download is incomplete or damaged, get it again (/a)":
    "文件头声称有 7 个张量，而文件只有 8 字节：下载不完整或已损坏，请重新下载 (/a)",
    "the text at byte 7 is not UTF-8: the download is incomplete or damaged, get it again (/a)":
    "字节 7 处的文本不是 UTF-8：下载不完整或已损坏，请重新下载 (/a)",
    "GGUF type number 99 is unknown: update Graft, or get the model in another type (tensor blk.0, /a)":
    "不认识编号为 99 的 GGUF 类型：请更新 Graft，或下载其他类型的模型 (张量 blk.0, /a)",
    "Q8_1 is a format of activations, not of weights: convert the model to Q8_0 instead (tensor blk.0, /a)":
    "Q8_1 是激活值的格式，不是权重的格式：请把模型转换为 Q8_0 (张量 blk.0, /a)",
    "x has 768 columns, but the Q4_K weight has 4096: is the text encoder that of this model?":
    "输入有 768 列，而 Q4_K 权重有 4096 列：文本编码器是这个模型的吗？",
    "the file has a tokenizer of the kind 'bert': get a GGUF that llama.cpp's converter made from the original "
    "model, with gpt2 or llama (/a)":
    "文件里的分词器种类是 'bert'：请下载 llama.cpp 的转换工具从原始模型制作的 GGUF，种类为 gpt2 或 llama (/a)",
    "backend 'triton' cannot run here: a trial launch failed with RuntimeError: no message; choose 'auto' to "
    "take the best that can":
    "解码后端 'triton' 在这里不能运行：试运行失败：RuntimeError：没有消息；请选 'auto'，"
    "会选用能运行的最好的一个",
    "it cannot differ from place to place (an embedding): take the mask off":
    "它不能在各个位置有不同的强度（词嵌入）：请去掉遮罩",
    "memory ran out in training: switch gradient_checkpointing on, or set batch_size to 1 and use accumulate, "
    "or use smaller pictures, or a file with fewer bits; the 7 steps that were done are kept in /a":
    "训练时内存不足：请打开“梯度检查点”，或把“批次大小”设为 1 并使用“梯度累积”，"
    "或使用更小的图片或位数更少的文件；已完成的 7 步保存在 /a",
    "a.gguf is not there: put it into the vae folder, or choose another file; b.gguf (SHA-256 1a2b3c) is not "
    "there, there is c.gguf and d.gguf: choose that, or put b.gguf into the vae folder (3 files here are being "
    "compared with it: try again soon)":
    "a.gguf 不存在：请把它放入 vae 文件夹，或选择其他文件；b.gguf (SHA-256 1a2b3c) 不存在，但有 c.gguf 和 "
    "d.gguf：请选择其中之一，或把 b.gguf 放入 vae 文件夹（正在与这里的 3 个文件比对：请稍后再试）",
    "put these files into the loras folder, choose another one, or switch the row off: a.safetensors (row 1, "
    "there is x and y), b.safetensors (row 12)":
    "请把文件放入 loras 文件夹，或选择其他文件，或停用该行：a.safetensors (第 1 行，这里有 x 和 y), "
    "b.safetensors (第 12 行)",
    "this is a VAE, not a diffusion model: use a VAE loader that reads GGUF, such as Load VAE Picture Decoder "
    "(GGUF, Graft) (/a)":
    "这是 VAE，不是扩散模型：请使用能读取 GGUF 的 VAE 加载器，例如“加载 VAE（GGUF，Graft）” (/a)",
    "unet_name - a.gguf is not there: put it into the diffusion_models folder, or choose another file":
    "unet_name - a.gguf 不存在：请把它放入 diffusion_models 文件夹，或选择其他文件",
}  # fmt: skip
"""Whole texts, and what the page says."""

OF_COMFYUI = {
    *("加载风格模型", "加载音频编码器", "加载放大模型", "加载Latent放大模型", "加载CLIP视觉", "加载VAE", "训练 LoRA"),
}
"""Nodes that ComfyUI itself has under these names."""

SAMPLES = {
    **{"list": "[3, 4]", "tuple": "(3, 4)", "times": "3×4", "size_text": "7.5 GB"},
    **{"layers": "7 layers", "in_words": "7 layers"},
}
"""What functions give; of all else the sample is a number, which may stand for a name, too."""
SAMPLE = "7"


class Texts(ast.NodeVisitor):
    """The texts of a file that read like words, with samples in them; no docstrings, log lines and tooltips."""

    def __init__(self, path: Path) -> None:
        self.found: dict[str, int] = {}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = (node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign)))
        self.constants = {ast.unparse(getattr(n, "target", None) or n.targets[0]): n.value for n in named}
        self.visit(tree)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).partition(".")[0] not in ("log", "re"):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if ast.unparse(node.targets[0]) not in ("DESCRIPTION", "SEARCH_ALIASES", "OUTPUT_TOOLTIPS"):
            self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if not (isinstance(key, ast.Constant) and key.value == "tooltip"):
                self.visit(value)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._add(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._add(node)

    def _add(self, node: ast.expr) -> None:
        for text in self.samples(node):
            if " " in text.strip() and english(text):
                self.found.setdefault(text, node.lineno)

    def samples(self, node: ast.expr | None) -> list[str]:
        """What an expression may come to."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return ["".join(each) for each in itertools.product(*map(self.samples, parts))]
            case ast.FormattedValue(value=value, format_spec=None):
                return self.samples(value)
            case ast.IfExp(body=one, orelse=other):
                return [*self.samples(one), *self.samples(other)]
            case ast.BoolOp(op=ast.Or(), values=values):
                return [text for value in values for text in self.samples(value)]
            case ast.Name(id=name) if name in self.constants:
                return self.samples(self.constants[name])
            case ast.Call(func=ast.Name(id="_counted"), args=[_, ast.Constant(value=what)]):
                return [f"7 {what}s"]
            case ast.Call(func=function):
                return [SAMPLES.get(ast.unparse(function).rpartition(".")[2], SAMPLE)]
            case _:
                return [SAMPLE]


def texts() -> Iterator[tuple[str, str]]:
    """Each text of the code, and where it stands."""
    for path in CODE:
        name = path.relative_to(ROOT).as_posix()
        if name not in NOT_FOR_THE_PAGE:
            yield from ((text, f"{name}:{line}") for text, line in Texts(path).found.items())


def kinds() -> list[str]:
    """What is said of a file of each kind where another one is wanted."""
    this = [f"this is {kind.what}, not a diffusion model: {kind.remedy} (/a)" for kind in KINDS]
    others = [kind for kind in KINDS if kind is not TEXT_ENCODER]
    return [*this, *(f"vae is {kind.what}, not a text encoder: {kind.remedy} (/a)" for kind in others)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], dict]:
    """Texts as the page puts them into Chinese, and the phrases that none of them has."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no phrase was tried: there is no node (apt install nodejs)")
    folder = tmp_path_factory.mktemp("web")
    for name in ("phrases.js", "reports.js", "errors.js"):
        shutil.copy(WEB / name, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "run.js").write_text(RUN)

    def run(given: list[str]) -> dict:
        done = subprocess.run([node, "run.js"], cwd=folder, input=json.dumps(given), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


RUN = """
import { readFileSync } from "node:fs";
import { ZH as errors } from "./errors.js";
import { translated } from "./phrases.js";
import { ZH as reports } from "./reports.js";

const rows = [...reports, ...errors];
const unused = new Map(rows.map((row) => [row, String(row[0])]));
for (const row of rows) {
  const [pattern] = row;
  row[0] = {
    [Symbol.replace](text, words) {
      const said = text.replace(pattern, words);
      if (said !== text) unused.delete(row);
      return said;
    },
  };
}
const texts = JSON.parse(readFileSync(0, "utf8"));
const said = texts.map((text) => translated(text, "zh"));
console.log(JSON.stringify({ said, unused: [...unused.values()], same: texts.map((text) => translated(text, "en")) }));
"""


def english(text: str) -> list[str]:
    """Words in a text that are neither names nor code."""
    plain = re.sub(r"`[^`]*`|'[^']*'", " ", text)
    tokens = re.findall(r"[^\s，：；。、（）“”？×·→,;:()\[\]\"!?]+", plain)
    return [t for t in tokens if re.fullmatch(r"[A-Za-z][a-z]+('[a-z]+)?\.?", t) and t.rstrip(".") not in NAMES]


def test_none_is_missing_and_none_left_over(page: Callable[[list[str]], dict]) -> None:
    tooltips = set(re.findall(r'"((?:[^"\\]|\\.)+)"', (ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8")))
    labels = set(re.findall(r'^  "?([\w\' ]+)"?: ', (WEB / "words.js").read_text("utf-8"), re.MULTILINE))
    told = dict.fromkeys(kinds(), "ops/files/contents.py") | dict.fromkeys(WHOLE, "here")
    for text, place in texts():
        if text not in tooltips | labels and not any(re.search(pattern, text) for pattern in NOT_A_PHRASE):
            told.setdefault(WITHIN.get(text, text), place)
    found = page(list(told))
    left = [f"{place}: {' '.join(words)}: {said}" for place, said in zip(told.values(), found["said"], strict=True)
            if (words := english(said))]  # fmt: skip
    assert left == [] and found["unused"] == [] and found["same"] == list(told)


def test_what_is_excused_stands_in_the_code() -> None:
    """What is no longer said is no longer excused."""
    found = {text for text, _ in texts()}
    assert set(WITHIN) - found == set()
    assert [pattern for pattern in NOT_A_PHRASE if not any(re.search(pattern, text) for text in found)] == []


def test_nodes_are_called_as_they_are_in_chinese(page: Callable[[list[str]], dict]) -> None:
    english, chinese = (
        json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8")) for language in ("en", "zh")
    )
    names = {node["display_name"]: chinese[key]["display_name"] for key, node in english.items()}
    tables = "".join((WEB / name).read_text("utf-8") for name in ("errors.js", "reports.js"))
    assert set(re.findall(r"“([^”]*（(?:GGUF，)?Graft）)”", tables)) - set(names.values()) == set()
    for (name, wanted), said in zip(names.items(), page(list(names))["said"], strict=True):
        assert said in (name, f"“{wanted}”")
    inputs = {given["name"] for node in chinese.values() for given in node["inputs"].values()}
    quoted = set(re.findall(r"“([^”（$[\n]+)”", tables)) - set(names.values())
    assert quoted - inputs == OF_COMFYUI


def test_whole_texts(page: Callable[[list[str]], dict]) -> None:
    assert page(list(WHOLE))["said"] == list(WHOLE.values())


def test_what_others_say_stays_as_it_is(page: Callable[[list[str]], dict]) -> None:
    others = [
        "mat1 and mat2 shapes cannot be multiplied (77x768 and 4096x3072)",
        "Allocation on device 0 would exceed allowed memory. (out of memory)",
        "Error(s) in loading state_dict for Flux:\n\tsize mismatch for img_in.weight",
        "'NoneType' object has no attribute 'shape'",
        "[Errno 2] No such file or directory: '/models/a: b; c.png'",
        "Value not in list: ckpt_name: 'a.safetensors' not in ['b.safetensors']",
    ]
    assert page(others)["said"] == others
