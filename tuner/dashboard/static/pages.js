// Updates every [data-live] without reloading the page. Without scripts, reload by hand.
"use strict";
const lives = [...document.querySelectorAll("[data-live]")];
async function refresh() {
  const idle = lives.filter((live) => !live.contains(document.activeElement));
  if (document.hidden || !idle.length) return;
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.redirected) location.reload(); // the session ended
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const live of idle) {
    const fresh = page.getElementById(live.id);
    if (fresh && fresh.innerHTML !== live.innerHTML) live.replaceChildren(...fresh.childNodes);
  }
}
if (lives.length) setInterval(() => refresh().catch(() => {}), 1000 * Number(lives[0].dataset.live));
