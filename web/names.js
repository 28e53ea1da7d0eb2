/**
 * Names of model files: which file of this computer is nearest to one that a workflow names. `ops/workflows/names.py`
 * says the same.
 */

import { TABLE } from "./table.js";

const ENDING = /\.[a-z0-9]+$/i;
const QUANTIZATION = new RegExp(TABLE.names.quantization, "g");
const FILLERS = new RegExp(TABLE.names.fillers, "g"); // words that tell nothing apart
/** Words that tell models of one family apart: two names have the same ones, or are of different models. */
const KINDS = new Set(TABLE.names.kinds.split(" "));
const LONGEST = TABLE.names.longest; // characters that a system lets a name have
const NEAR = TABLE.names.near; // the least share of pairs of letters that two names have in common

/** A name without what differs from one system to another. */
export const fold = (name) => name.replaceAll("\\", "/").toLowerCase();

const fileOf = (name) => name.replaceAll("\\", "/").split("/").at(-1);

export const isGGUF = (name) => /\.gguf$/i.test(name);

/**
 * The file that is meant by `name`: itself, the same in another spelling or folder, or the nearest of those that
 * `fits`, which are GGUF files; undefined if none is near.
 */
export function nearest(name, files, fits = isGGUF) {
  if (typeof name !== "string" || !name) return undefined;
  const spelled = files.filter((file) => fold(file) === fold(name));
  const moved = files.filter((file) => fold(fileOf(file)) === fold(fileOf(name)));
  for (const found of [spelled, moved.filter(fits)]) if (found.length === 1 && fits(found[0])) return found[0];
  const wanted = described(name);
  const near = files.filter(fits).map((file) => ({ file, share: likeness(wanted, described(file)) }));
  const [best] = near.filter(({ share }) => share >= NEAR).sort((a, b) => b.share - a.share);
  return best?.file ?? spelled[0] ?? (moved.length === 1 ? moved[0] : undefined);
}

/** A name as its letters, its version, its size and the words that tell kinds apart. */
function described(name) {
  const words = fileOf(name).slice(-LONGEST).replace(ENDING, "").replace(/([a-z])([A-Z])/g, "$1_$2");
  const plain = words.toLowerCase().replace(QUANTIZATION, "").replace(FILLERS, "");
  const tokens = plain.split(/[^a-z0-9]+/).map((token) => token.replace(/^(high|low)noise$/, "$1"));
  const kinds = tokens.filter((token) => KINDS.has(token) || /^\d{4}$/.test(token));
  const unkind = tokens.filter((token) => !KINDS.has(token)).join("_");
  const [, version] = unkind.match(/[a-z]_?(\d+(?:_\d(?![a-z0-9]))*)/) ?? [];
  const [, size] = plain.match(/(?<!\d)(\d+(?:\.\d+)?)b(?![a-z0-9])/) ?? [];
  return { letters: tokens.join(""), kinds: kinds.sort().join(), version, size };
}

/** From 0, of different models, to 1. */
function likeness(a, b) {
  const differ = (field) => a[field] !== undefined && b[field] !== undefined && a[field] !== b[field];
  if (a.kinds !== b.kinds || differ("version") || differ("size")) return 0;
  const [of, other] = [pairs(a.letters), pairs(b.letters)];
  const common = of.filter((pair) => other.includes(pair)).length;
  return (2 * common) / (of.length + other.length || 1);
}

const pairs = (letters) => [...letters].slice(1).map((letter, index) => letters[index] + letter);
