// Puts the page together: asks the server every two seconds while the page is seen.

import { setUpUpload, showAdapters } from "./adapters.js";
import { askJson } from "./api.js";
import { offer, setUpChat } from "./chat.js";
import { byId, calm, complain, rememberKey } from "./page.js";
import { setUpTraining, showJobs } from "./training.js";

const PAUSE = 2000;
let base = "";
let failing = false;

async function refresh() {
  const models = await askJson("v1/models");
  base = models.data.find((one) => one.parent === null)?.id ?? "";
  byId("server").textContent = `serves ${base}`;
  offer(models.data.filter((one) => one.parent !== null).map((one) => one.id));
  const parts = await Promise.allSettled([showAdapters(base, refresh), showJobs()]);
  // A key may be for less than all that the page shows: what it is for goes on.
  const failed = parts.find((part) => part.status === "rejected" && part.reason.status !== 403);
  if (failed) throw failed.reason;
}

// What one poll complains of, the next one that succeeds takes back.
async function poll() {
  try {
    await refresh();
    if (failing) calm();
    failing = false;
  } catch (error) {
    failing = true;
    if (error.status !== 401 || byId("problem").hidden) complain(error);
  }
}

async function keepPolling() {
  if (!document.hidden) await poll();
  setTimeout(keepPolling, PAUSE);
}

rememberKey(poll);
setUpUpload(refresh);
setUpChat(() => base);
setUpTraining(() => base);
keepPolling();
