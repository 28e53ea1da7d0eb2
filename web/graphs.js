/** The graphs that the page holds: the workflow's own, and those of its subgraphs. */

import { app } from "../../scripts/app.js";

export const rootOf = () => app.rootGraph ?? app.graph;

/** All nodes of the workflow, in subgraphs too. */
export const allNodes = () =>
  [rootOf(), ...(rootOf().subgraphs?.values() ?? [])].flatMap((graph) => graph._nodes ?? graph.nodes ?? []);
