/** Which loaders ours stand for, and what names of files tell: the table that Python reads, too. */

const answer = await fetch(new URL("./loaders.json", import.meta.url), { cache: "no-cache" });

export const TABLE = await answer.json();
