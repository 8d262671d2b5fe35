// Keeps what stands in #live fresh, without loading the page anew. Without it, reload by hand.
"use strict";
const live = document.getElementById("live");
async function refresh() {
  if (document.hidden || live.contains(document.activeElement)) return;
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.redirected) location.reload(); // the session ended
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.getElementById("live");
  if (fresh && fresh.innerHTML !== live.innerHTML) live.replaceChildren(...fresh.childNodes);
}
if (live) setInterval(() => refresh().catch(() => {}), 1000 * Number(live.dataset.live));
