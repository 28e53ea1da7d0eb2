/**
 * What our nodes report, in the language that ComfyUI is set to. The server writes it in English, since it serves pages
 * in several languages; here its phrases are put into the page's. What has no phrase stays English, as do names of
 * files, types and layers.
 */

import { language } from "./words.js";

/** `[pattern, text]` in the order in which they are put in; a pattern ends before what is a name or a number. */
const ZH = [
  // where a model runs, and what would be faster
  [/runs on the processor: the model takes (.+?) of ([\d.]+ \w+)/g, "在处理器上运行：模型占用 $1，共 $2"],
  [/runs on (.+?): the model takes (.+?) of ([\d.]+ \w+)/g, "在 $1 上运行：模型占用 $2，共 $3"],
  [/, dynamic VRAM is on/g, "，动态显存已打开"],
  [
    /\. ComfyUI keeps a part of it in main memory, which is slower: a file of up to (.+?) stays on the card/g,
    "。ComfyUI 会把一部分放在内存里，这样较慢：不超过 $1 的文件能全部放进显存",
  ],
  [/weights are decoded on the card, in Triton kernels/g, "权重在显卡上由 Triton 内核解码"],
  [/weights are decoded by libgguf/g, "权重由 libgguf 解码"],
  [/weights are decoded by torch code/g, "权重由 torch 代码解码"],
  [/faster: choose fp16 in compute_dtype, this card has no bf16 units/g, "更快的方法：compute_dtype 选 fp16，这块显卡没有 bf16 单元"],
  [
    /faster: run (.+?) in the folder of ComfyUI_windows_portable and start ComfyUI again/g,
    "更快的方法：在 ComfyUI_windows_portable 文件夹里运行 $1，然后重启 ComfyUI",
  ],
  [/faster: run (.+?) with ComfyUI's Python and start ComfyUI again/g, "更快的方法：用 ComfyUI 的 Python 运行 $1，然后重启 ComfyUI"],
  [
    /faster: install PyTorch for ROCm from pytorch\.org, which brings Triton, and start ComfyUI again/g,
    "更快的方法：从 pytorch.org 安装 ROCm 版 PyTorch（自带 Triton），然后重启 ComfyUI",
  ],
  [
    /faster on Linux: PyTorch for ROCm brings Triton there\. Triton for AMD cards on Windows was not tried/g,
    "在 Linux 上更快：那里的 ROCm 版 PyTorch 自带 Triton。Windows 上 AMD 显卡的 Triton 没有试过",
  ],
  [
    /Triton is made for NVIDIA cards from the RTX 30 series on: this one has no faster way/g,
    "Triton 支持 RTX 30 系列及以后的 NVIDIA 显卡：这块显卡没有更快的方法",
  ],
  [/ \(compute_dtype (\w+) is faster on this processor\)/g, "（在这个处理器上 compute_dtype 选 $1 更快）"],
  [/int8 is not used: /g, "没有使用 int8："],
  [/(\d+) layers? in int8, where there are many tokens/g, "$1 层在 token 多时用 int8 计算"],
  [/(\d+) layers? not in int8/g, "$1 层不用 int8"],
  [/made by Graft: /g, "由 Graft 制作："],
  [/ · with an importance matrix/g, " · 使用了重要性矩阵"],
  [/ · sees with /g, " · 视觉投影 "],
  [/: not used, none of these text encoders sees with it/g, "：没有使用，这些文本编码器都不用它看图"],
  // what became of a LoRA
  [/: skipped, the file is not here/g, "：已跳过，没有这个文件"],
  [/: on this model already, not put on it again/g, "：模型上已经有了，没有再加一次"],
  [/: does nothing at strength 0/g, "：强度为 0，没有作用"],
  [/^no LoRA is switched on$/gm, "没有启用任何 LoRA"],
  [/ holds no adapter that is known here: is it a LoRA\?/g, " 里没有能识别的适配器：它是 LoRA 吗？"],
  [/ is for a text encoder only \((\d+) layers?\): connect a CLIP to LoRA Stack \(Graft\)/g, " 只用于文本编码器（$1 层）：请把 CLIP 接到 LoRA 堆（Graft）"],
  [/ is for another text encoder \(0 of (\d+) layers? match\)/g, " 用于另一种文本编码器（$1 层都不匹配）"],
  [/: it does not fit this model/g, "：不适合这个模型"],
  [/trained for ([^,\n]+?), model is ([^()\n]+?)(?=\)| \()/g, "为 $1 训练，模型是 $2"],
  [/the file is for another version of ([^()\n]+?)(?=\)| \()/g, "这个文件用于 $1 的另一个版本"],
  [/its names are not those of ([^()\n]+?)(?=\)| \()/g, "其中的名称不是 $1 的"],
  [/ \(0 of (\d+) layers match\), such as /g, "（$1 层都不匹配），例如 "],
  [/: 0 of (\d+) layers fit, such as /g, "：$1 层都不适合，例如 "],
  [/; (\d+) not in this model, such as /g, "；模型里没有其中 $1 个，例如 "],
  [/; (\d+) left out, such as /g, "；$1 个没有使用，例如 "],
  [/^(\d+) left out: /gm, "$1 个没有使用："],
  [/connect a CLIP for the (\d+) layers? of text encoders in this file/g, "请接上 CLIP：文件里有文本编码器的 $1 层"],
  [/(\d+) of (\d+) text encoder layers on the CLIP/g, "文本编码器 $2 层中的 $1 层已加到 CLIP 上"],
  [/: (\d+) layers? of the text encoder/g, "：文本编码器 $1 层"],
  [/(\d+) layers? next to the quantized weights/g, "$1 层在量化权重旁计算"],
  [/(\d+) layers? merged into a decoded copy of the weight/g, "$1 层合并到解码后的权重副本中"],
  [/(\d+) layers? patched by ComfyUI/g, "$1 层由 ComfyUI 修改"],
  [/(\d+) other parameters, patched by ComfyUI itself/g, "另有 $1 个参数由 ComfyUI 自己修改"],
  [/no block of this model is called (.+)$/gm, "模型里没有叫 $1 的块"],
  [/^( *)([\w-]+) names(?=;|$)/gm, "$1$2 命名"],
  [/, rank (\d+) to (\d+)/g, "，秩 $1 到 $2"],
  [/, rank (\d+)/g, "，秩 $1"],
  [/in a region of (\d+) %/g, "在占画面 $1 % 的区域里"],
  [/by (share|step|sigma) (?=-?[\d.]+ = )/g, "按 $1："],
  [/for the positive prompt/g, "用于正面提示词"],
  [/for the negative prompt/g, "用于负面提示词"],
  [/with weights of blocks/g, "带有各块的权重"],
  // of Inspect
  [/^from LoRA Stack: /gm, "来自 LoRA 堆："],
  [/^no adapters$/gm, "没有适配器"],
  [/^outside of the blocks/gm, "块之外"],
  [/^nothing is called (.*)$/gm, "没有名称包含 $1 的内容"],
  [/^and (\d+) more$/gm, "还有 $1 个"],
  [/^a (\w+) of another loader: Graft adds nothing to it$/gm, "由其他加载器加载的 $1：Graft 没有给它加任何东西"],
  // of what makes files
  [/^saved (.+?), ([\d.]+ \w+) in (\d+) s$/gm, "已保存 $1，$2，用时 $3 秒"],
  [/(\d+) layers? in another type, /g, "$1 层用了另一种类型，"],
  [/rows of (\d+) do not fit (\w+) \(blocks of (\d+)\)/g, "每行 $1 个数，不适合 $2（每块 $3 个）"],
  [/no importance data, which (\w+) needs/g, "没有重要性数据，而 $1 需要"],
  [
    /(\d+) layers? were quantized before and are quantized again, which loses more than starting from the full model/g,
    "$1 层以前量化过，现在再次量化，比从完整模型量化损失更多",
  ],
  [/(\d+) layers? of the model are in fp8: what fp8 has lost cannot come back/g, "模型的 $1 层是 fp8：fp8 已有的损失无法找回"],
  [/the importance matrix has no data for (\d+) layers?/g, "重要性矩阵里没有其中 $1 层的数据"],
  [/Graft reads this file; ComfyUI-GGUF does not know the architecture (\S+)/g, "Graft 能读取这个文件；ComfyUI-GGUF 不认识架构 $1"],
  [/(\d+) layers? in (\d+) model calls?, up to ([\d,]+) rows each/g, "$2 次模型调用中的 $1 层，每层最多 $3 行"],
  [/(\d+) layers? did not run, so nothing is known of them/g, "$1 层没有运行，所以没有它们的数据"],
  [/(\d+) layers? of rank up to (\d+)/g, "$1 层，秩最高 $2"],
  [/^nothing was cut$/gm, "没有裁剪"],
  [/(\d+) in full, as two small factors cannot hold them: /g, "$1 个完整保存，因为两个小因子装不下："],
  [/lost by rank (\d+): ([\d.]+%)/g, "秩 $1 损失 $2"],
  // of training
  [/went on from step (\d+) of (.+?), exactly/g, "从 $2 的第 $1 步完全一样地继续"],
  [
    /began with the factors of (.+?); its \.training file is not there or does not fit, so the optimizer began anew/g,
    "从 $1 的权重开始；没有合适的 .training 文件，所以优化器从头开始",
  ],
  [/, on (\d+) layers?, ([\d,]+) numbers/g, "，加在 $1 层旁边，共 $2 个数"],
  [/^(\d+) pictures, (\d+) steps, ([\d.]+) s a step/gm, "$1 张图片，$2 步，每步 $3 秒"],
  [/^loss ([\d.]+) -> ([\d.]+)/gm, "损失 $1 → $2"],
  [/^trained on /gm, "训练所用的模型："],
  [/([\d,]+) bytes: /g, "$1 字节："],
  // what several of them say
  [/^(.+?) is here for (.+?), the same file by its SHA-256$/gm, "$2 在这里是 $1（SHA-256 相同，是同一个文件）"],
  [/^(.+?) is here for (.+)$/gm, "$2 在这里是 $1"],
  [/ changes the weights by: /g, " 对权重的改变："],
  [/ \(most in (\d+): /g, "（第 $1 块最多："],
  [/(\d+)\/(\d+) layers?/g, "$1/$2 层"],
  [/: (\d+) layers?(?=$|\n)/gm, "：$1 层"],
];

const TABLES = { zh: ZH };

/** A report in the page's language. */
export function translated(text) {
  return (TABLES[language()] ?? []).reduce((said, [pattern, words]) => said.replace(pattern, words), text);
}
