/**
 * Errors of ours in the page's language, before ComfyUI shows them: of a run, of a prompt that it refuses, and in the list
 * of what has run. Errors of others, and what ComfyUI itself says around ours, stay as they are.
 */

import { api } from "../../scripts/api.js";
import { translated } from "./phrases.js";
import { language } from "./words.js";

const OURS = /^graft\./; // the module of all our errors (kernels/errors.py)

const isOurs = (error) => OURS.test(error?.exception_type);

/** An answer of `VALIDATE_INPUTS` is a text with no type: it is told by its node. */
const isAnswer = ({ type }, node) => type === "custom_validation_failed" && String(node).startsWith("Graft");

function translate(error) {
  if (isOurs(error) && error.exception_message) error.exception_message = translated(error.exception_message, language());
}

/** What `/prompt` says of nodes that do not pass: each by itself, and all of them in one text. */
function translateRefusal(answer) {
  for (const { class_type: node, errors } of Object.values(answer?.node_errors ?? {})) {
    for (const error of errors) {
      if (!error.details || !(isOurs(error.extra_info) || isAnswer(error, node))) continue;
      const { details } = error;
      error.details = translated(details, language());
      translate(error.extra_info);
      const all = answer.error;
      if (all?.details) all.details = all.details.replaceAll(details, () => error.details);
    }
  }
}

/** `what`, translated in place; as it is where it is of another form than all that is known. */
function tried(translation, what) {
  try {
    translation(what);
  } catch (problem) {
    console.debug("Graft: an error stays in English", problem);
  }
  return what;
}

/** Translates what a function of the page's returns, or the answer in what it throws. */
function after(name, translation) {
  const before = api[name];
  api[name] = async function (...given) {
    let result;
    try {
      result = await before.apply(this, given);
    } catch (error) {
      tried(translation, error?.response);
      throw error;
    }
    return tried(translation, result);
  };
}

export function translateErrors() {
  // a listener would be too late: the page's own are there before, and browsers call an object's in their order
  const { dispatchCustomEvent } = api;
  api.dispatchCustomEvent = function (type, detail, ...given) {
    if (type === "execution_error") tried(translate, detail);
    return dispatchCustomEvent.call(this, type, detail, ...given);
  };
  after("queuePrompt", translateRefusal);
  after("getHistory", (jobs) => Array.isArray(jobs) && jobs.forEach((job) => translate(job.execution_error)));
}
