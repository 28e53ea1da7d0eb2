/**
 * What our part of the page says, in the language that ComfyUI is set to. Names and tooltips of nodes are in `locales/`,
 * which ComfyUI reads by itself.
 */

import { app } from "../../scripts/app.js";

const ZH = {
  // rows of LoRA Stack
  "+ Add LoRA": "+ 添加 LoRA",
  "no file in models/loras": "models/loras 中没有文件",
  "{file}: choose another file": "{file}：点击更换文件",
  "Switch row {row} on and off": "启用或停用第 {row} 行",
  "Switch all rows on and off": "启用或停用所有行",
  "Has where and when": "已设置作用位置与时机",
  "where and when, row {row}": "位置与时机，第 {row} 行",
  Strength: "强度",
  "Strength for CLIP": "CLIP 强度",
  "model, CLIP": "模型, CLIP",
  "skips missing files": "跳过缺失文件",
  More: "更多",
  "Presets and more": "预设与更多",
  Info: "信息",
  "Link where and when": "连接位置与时机",
  "Remove the link for where and when": "断开位置与时机",
  "Move up": "上移",
  "Move down": "下移",
  "Insert above": "在上方插入",
  "Insert below": "在下方插入",
  Remove: "移除",
  // presets of rows
  "Save the rows as a preset": "将这些行保存为预设",
  "Load a preset": "加载预设",
  "Add the rows of a preset": "追加预设中的行",
  "Delete a preset": "删除预设",
  "Name of the preset": "预设名称",
  "Replace the preset {name}?": "替换预设“{name}”？",
  "Delete the preset {name}?": "删除预设“{name}”？",
  "no preset yet": "还没有预设",
  "Preset saved: {name}": "预设已保存：{name}",
  "The preset cannot be read: {name}": "无法读取预设：{name}",
  "Skip rows whose file is missing": "文件缺失时跳过该行",
  "Stop if a file is missing": "文件缺失时停止",
  // what a file says of itself
  "This file is not in your loras folder": "loras 文件夹中没有这个文件",
  "The file says nothing about itself": "文件中没有附带说明",
  "Trigger words": "触发词",
  "Copy the trigger words": "复制触发词",
  Close: "关闭",
  kind: "类型",
  "trained for": "适用模型",
  names: "命名方式",
  title: "标题",
  author: "作者",
  description: "说明",
  "how to use": "用法",
  license: "许可证",
  "base model": "基础模型",
  "trained on": "训练底模",
  pictures: "图片数量",
  resolution: "分辨率",
  steps: "步数",
  epochs: "轮数",
  "learning rate": "学习率",
  optimizer: "优化器",
  network: "网络模块",
  alpha: "alpha",
  "trainer's comment": "训练者备注",
  date: "日期",
  "words in captions": "标注高频词",
  // text on nodes
  report: "报告",
  // our loaders in others' place
  "Use GGUF (Graft)": "使用 GGUF（Graft）",
  "Use GGUF (Graft) in the whole workflow": "整个工作流使用 GGUF（Graft）",
  "Back from Graft's loader": "换回原来的加载器",
  "Back from all of Graft's loaders": "换回所有原来的加载器",
  "left as it is: there is no GGUF with a name like {names}": "保持不变：没有名称接近 {names} 的 GGUF",
  "left as it is: choose Convert to nodes on the group node {name} first": "保持不变：请先在组节点 {name} 上选择“转换为节点”",
  "{is} for {was}": "{was} → {is}",
  "choose a file on node {id}: there is none with a name like {was}": "请在节点 {id} 上选择文件：没有名称接近 {was} 的文件",
  "not taken along: {choice}": "没有带过来：{choice}",
  "1 loader changed, Ctrl+Z undoes it": "已更换 1 个加载器，Ctrl+Z 可撤销",
  "{changed} loaders changed, Ctrl+Z undoes it": "已更换 {changed} 个加载器，Ctrl+Z 可撤销",
  "No change": "没有变化",
  // files of a workflow
  "Files have other names here": "有些文件在这里的名称不同",
  "{is} for {was}, the same file by its SHA-256": "{was} → {is}，SHA-256 相同，是同一个文件",
  "A file of this workflow is missing": "此工作流缺少一个文件",
  "{count} files of this workflow are missing": "此工作流缺少 {count} 个文件",
  "into models/{directory}": "放入 models/{directory}",
};

const TABLES = { zh: ZH };

/** That the page is in, such as `zh`. */
export const language = () => app.extensionManager?.setting?.get?.("Comfy.Locale");

/** What stands for an English text in the page's language; `{name}` in it is `values.name`. */
export function say(text, values = {}) {
  const found = TABLES[language()]?.[text] ?? text;
  return found.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
