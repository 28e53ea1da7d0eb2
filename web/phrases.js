/**
 * What the server says, in the page's language. It writes English, since it serves pages in several languages; here its
 * phrases are put into another one. What has no phrase stays English, as do names of files, types and layers.
 */

import * as errors from "./errors.js";
import * as reports from "./reports.js";

/** `[pattern, text]` in the order in which they are put in; a pattern ends before what is a name or a number. */
const TABLES = { zh: [...reports.ZH, ...errors.ZH] };

/** A report or an error of ours in `language`, such as `zh`. */
export function translated(text, language) {
  return (TABLES[language] ?? []).reduce((said, [pattern, words]) => said.replace(pattern, words), text);
}
