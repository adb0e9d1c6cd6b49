/* The demo's page: polls the figures several times per second and shows them. All data is inserted as text. */
"use strict";

(() => {
  const POLL_MS = 300, SLOW_POLL_MS = 2000; // between two polls; while the page is hidden, or the demo does not answer
  const SAMPLES = 60; // seconds of the queue's chart
  const BLOCKS = 36; // reports that are drawn in the queue, also those that state.json does not list
  const STRIPS = 4, STREAMS = 8; // viewings, and open streams, that are shown
  const API = {
    well: "It answers as its documentation describes.",
    deny: "It answers permission_denied, as for a server that is not whitelisted. Reports wait; none is dropped.",
    hang: "It accepts each request and does not answer. The relay stops waiting after some seconds, and sends the report again later.",
    down: "It is unplugged: connections are refused. Continue to play, and watch the queue grow.",
  };
  const IS = { sent: "recorded", waiting: "waits", asking: "on its way", refused: "refused" };

  const pages = document.body.dataset.pages, mine = document.body.dataset.mine;
  const film = document.getElementById("film");
  const place = (id) => document.getElementById(id);
  const announced = new Map(); // report -> its state when it was last announced
  const depth = [];
  let run = null, first = true, shownState = "", failures = 0, timer = 0, sampled = 0, wanted = null, turns = 0;

  // Words.

  const size = (bytes) => {
    if (bytes < 1024) return `${bytes} B`;
    return bytes < 1 << 20 ? `${(bytes / 1024).toFixed(0)} KiB` : `${(bytes / (1 << 20)).toFixed(2)} MiB`;
  };
  const exact = (number) => number.toLocaleString("en");
  const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");
  const many = (number, one, more) => `${exact(number)} ${number === 1 ? one : more}`;
  const seconds = (ms) => (ms < 9950 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms / 1000)} s`);

  // Elements.

  const write = (element, text) => {
    if (element.textContent !== text) element.textContent = text;
  };
  const make = (name, className = "", text = "") => {
    const element = document.createElement(name);
    element.className = className;
    element.textContent = text;
    return element;
  };
  /* Updates the children of *list* to match *items* by key; elements whose key stays are kept. */
  const keep = (list, items, key, begin, show) => {
    const old = new Map([...list.children].map((child) => [child.dataset.key, child]));
    items.forEach((item, at) => {
      const name = String(key(item));
      let child = old.get(name);
      if (!child) {
        child = begin(item);
        child.dataset.key = name;
      }
      old.delete(name);
      show(child, item);
      if (list.children[at] !== child) list.insertBefore(child, list.children[at] || null);
    });
    while (list.children.length > items.length) list.lastElementChild.remove();
  };

  // A viewing's strip.

  const beginViewing = () => {
    const item = make("li"), about = make("p", "about"), strip = make("div", "strip");
    about.append(make("b"), make("span"));
    strip.setAttribute("role", "img");
    strip.append(make("div", "lane"));
    const scale = make("p", "scale");
    scale.setAttribute("aria-hidden", "true");
    item.append(about, strip, scale);
    return item;
  };
  const showViewing = (item, viewing) => {
    const [about, strip, scale] = item.children;
    const total = Math.max(viewing.total || 0, ...viewing.bars.map((bar) => bar.first + bar.sent), 1);
    const share = (bytes) => `${(100 * bytes) / total}%`;
    const sum = viewing.bars.reduce((sent, bar) => sent + bar.sent, 0);
    const own = viewing.of === mine ? "This page’s viewing" : "Viewing";
    write(about.children[0], `${own}, session ${viewing.session}`);
    const player = viewing.player ? `, ${viewing.player}` : "";
    write(about.children[1], `video ${viewing.video}${player} · ${clock(viewing.started)} · ${size(sum)} in ${many(viewing.bars.length, "response", "responses")}`);
    keep(strip.firstChild, viewing.bars, (bar) => bar.id, () => make("i"), (mark, bar) => {
      mark.className = `skip${bar.skip}${bar.open ? " open" : ""}`;
      mark.style.left = share(bar.first);
      mark.style.width = share(bar.sent);
      mark.title = `${bar.open ? "open, " : ""}skip ${bar.skip}: ${exact(bar.sent)} bytes from ${exact(bar.first)}`;
    });
    const jumps = viewing.bars.filter((bar) => bar.jump);
    strip.querySelectorAll(".jump").forEach((mark) => jumps.some((bar) => bar.id === mark.dataset.of) || mark.remove());
    for (const bar of jumps) {
      let mark = [...strip.querySelectorAll(".jump")].find((known) => known.dataset.of === bar.id);
      if (!mark) strip.append((mark = make("span", "jump")));
      mark.dataset.of = bar.id;
      mark.style.left = share(bar.first);
    }
    strip.setAttribute("aria-label", inWords(viewing.bars, jumps, total));
    keep(scale, [0, 0.25, 0.5, 0.75, 1], (part) => part, () => make("span"), (mark, part) => write(mark, part ? size(part * total) : "byte 0"));
  };
  const inWords = (bars, jumps, total) => {
    const percent = (bytes) => Math.round((100 * bytes) / total);
    const parts = bars.filter((bar) => bar.sent > total / 200).slice(-8);
    const words = parts.map((bar) => `${percent(bar.first)} to ${percent(bar.first + bar.sent)} % of the file, skip ${bar.skip}`);
    const places = [...new Set(jumps.map((bar) => percent(bar.first)))].slice(-8);
    return `Streamed: ${words.join("; ") || "nothing yet"}.${places.length ? ` Jumps to ${places.join(", ")} %.` : ""}`;
  };
  /* Marks the playing position on the strip of this page's latest viewing. Assumes that all seconds have about equal bytes. */
  const showHead = () => {
    const strip = [...place("viewings").children].find((item) => item.dataset.key.startsWith(`${mine}-`))?.children[1];
    if (!strip || !film.duration) return;
    let head = strip.querySelector(".head");
    if (!head) strip.append((head = make("span", "head")));
    document.querySelectorAll(".strip > .head").forEach((other) => other === head || other.remove());
    head.style.left = `${(100 * film.currentTime) / film.duration}%`;
  };

  // Streams and reports.

  const beginStream = () => {
    const item = make("li");
    item.append(make("span", "tag"), make("b"), make("span", "soft"));
    return item;
  };
  const showStream = (item, [viewing, bar, now]) => {
    const [tag, bytes, words] = item.children;
    tag.className = `tag skip${bar.skip}`;
    write(tag, `skip ${bar.skip}`);
    write(words, `session ${viewing.session} · from ${bar.first ? `byte ${exact(bar.first)}` : "the start"} · open for ${seconds(Math.max(now - bar.started, 0))}`);
    write(bytes, bar.size === null ? size(bar.sent) : `${size(bar.sent)} of ${size(bar.size)}`);
  };
  const beginReport = () => {
    const item = make("li", first ? "" : "new");
    item.append(make("span", "tag"), make("b"), make("span", "is"), make("time", "soft"), make("span", "soft"), make("span", "soft end"));
    return item;
  };
  const showReport = (item, report) => {
    const [tag, bytes, is, time, what, took] = item.children;
    write(time, clock(report.at));
    tag.className = `tag skip${report.skip}`;
    write(tag, `skip ${report.skip}`);
    write(bytes, `${exact(report.bytes)} bytes`);
    write(what, `session ${report.session} · video ${report.video}${report.said ? ` · ${report.said}` : ""}`);
    is.className = `is ${report.is}`;
    write(is, IS[report.is]);
    write(took, report.is === "sent" ? `after ${seconds(report.took)}` : "");
  };
  /* Text for screen readers: one sentence for each report that is new or has a new state. */
  const announce = (reports) => {
    const news = [];
    for (const report of [...reports].reverse()) {
      const state = report.is === "asking" ? "waiting" : report.is;
      if (announced.get(report.id) !== state && !first) {
        news.push(`Report of ${exact(report.bytes)} bytes, skip ${report.skip}, ${IS[state]}.`);
      }
      announced.set(report.id, state);
    }
    const there = new Set(reports.map((report) => report.id));
    for (const id of announced.keys()) if (!there.has(id)) announced.delete(id);
    if (news.length) write(place("news"), news.slice(-3).join(" "));
  };

  // The queue.

  const showQueue = (state) => {
    const waiting = state.figures.waiting;
    const kinds = state.reports.filter((report) => report.is === "waiting" || report.is === "asking").reverse();
    const blocks = Array.from({ length: Math.min(waiting, BLOCKS) }, (_, at) => ({ ...kinds[at], at }));
    const items = blocks.length ? blocks : [{ at: "none" }];
    if (waiting > BLOCKS) items.push({ at: "more" });
    keep(place("queue"), items, (item) => item.at, (item) => make(typeof item.at === "number" ? "i" : "span"), (mark, item) => {
      if (item.at === "none") write(mark, "Empty.");
      else if (item.at === "more") write(mark, `and ${exact(waiting - BLOCKS)} more`);
      else mark.className = `skip${item.skip ?? ""} ${item.is === "asking" ? "asking" : ""}`;
    });
    const oldest = waiting && state.oldest !== null ? `, the oldest for ${seconds(state.oldest * 1000)}` : "";
    place("queue").setAttribute("aria-label", waiting ? `${many(waiting, "report waits", "reports wait")}${oldest}` : "Nothing waits");
  };
  const showDepth = (waiting) => {
    const now = Date.now();
    if (now - sampled >= 1000) {
      sampled = now;
      depth.push(waiting);
      if (depth.length > SAMPLES) depth.shift();
    } else depth[depth.length - 1] = Math.max(depth[depth.length - 1], waiting);
    const most = Math.max(4, ...depth), from = SAMPLES - depth.length;
    const steps = depth.map((value, at) => `${at ? "V" : `M${from} `}${(38 - (36 * value) / most).toFixed(1)}H${from + at + 1}`).join("");
    const [area, line] = place("depth").children;
    area.setAttribute("d", `${steps}V40H${from}Z`);
    line.setAttribute("d", steps);
    write(place("depth-most"), Math.max(...depth) ? `at most ${many(Math.max(...depth), "report", "reports")} waiting` : "reports waiting");
  };

  // The whole page.

  const show = (state) => {
    if (run !== null && run !== state.run) return showProblem("The demo was started again. Reload this page to use the new one.");
    run = state.run;
    place("gone").hidden = true;
    const box = place("state");
    box.className = `state ${state.tone}`;
    // Without "(8 s)", because screen readers would read it again every second.
    const words = state.state.map((sentence) => sentence.replace(/ \(\d+ (s|min|h|days)\)/, ""));
    if (words.join(" ") !== shownState) {
      shownState = words.join(" ");
      box.replaceChildren(...words.map((sentence) => make("p", "", sentence)));
    }
    for (const [name, value] of Object.entries(state.figures)) write(place(`f-${name}`), exact(value));
    place("d-dead").hidden = !state.figures.dead;
    place("d-lost").hidden = !state.figures.lost;
    if (!wanted) showApi(state.api);
    showQueue(state);
    showDepth(state.figures.waiting);
    keep(place("viewings"), state.viewings.slice(0, STRIPS), (viewing) => viewing.id, beginViewing, showViewing);
    const open = state.viewings.flatMap((viewing) => viewing.bars.filter((bar) => bar.open).map((bar) => [viewing, bar, state.now]));
    keep(place("open"), open.slice(0, STREAMS), ([, bar]) => bar.id, beginStream, showStream);
    const shown = Math.min(open.length, STREAMS);
    write(place("no-open"), shown ? `And ${exact(state.figures.open - shown)} more.` : "None now.");
    keep(place("reports"), state.reports, (report) => report.id, beginReport, showReport);
    place("no-viewings").hidden = state.viewings.length > 0;
    place("no-open").hidden = shown > 0 && shown >= state.figures.open;
    place("no-reports").hidden = state.reports.length > 0;
    announce(state.reports);
    showHead();
    first = false;
  };
  const showApi = (api) => {
    document.querySelectorAll("#api input").forEach((input) => (input.checked = input.value === api.is));
    const helped = api.is === "well" && api.delivered ? " The demo delivered the waiting reports with ‘t23-middleware relay --once’, as an operator can, so that you need not wait for the relay’s next attempt." : "";
    write(place("api-words"), API[api.is] + helped);
  };
  const showProblem = (words) => {
    write(place("gone"), words);
    place("gone").hidden = false;
  };

  // Polling.

  const fetchJSON = async (path, options = {}) => {
    const answer = await fetch(pages + path, { cache: "no-store", signal: AbortSignal.timeout(5000), ...options });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    return answer.json();
  };
  const poll = async () => {
    const before = turns;
    try {
      const state = await fetchJSON("state.json");
      failures = 0;
      if (turns === before) show(state); // else the answer may be older than the switch, and would set it back
    } catch (error) {
      failures += 1;
      if (failures > 1) showProblem("The demo does not answer: it was ended, or is busy. This page shows the last known state. To start the demo again, run: t23-middleware demo");
    }
    clearTimeout(timer);
    timer = setTimeout(poll, failures > 1 || document.hidden ? SLOW_POLL_MS : POLL_MS);
  };
  /* One request at a time: the arrow keys can change the switch several times in a moment. */
  const turn = async (condition) => {
    write(place("api-words"), API[condition]);
    const busy = wanted !== null;
    wanted = condition;
    if (busy) return;
    let state = null;
    for (let sent = null; sent !== wanted; ) {
      sent = wanted;
      try {
        state = await fetchJSON("api", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ is: sent }) });
      } catch (error) {
        showProblem("The demo did not receive the change of the switch. Is it still running?");
      }
    }
    wanted = null;
    turns += 1;
    if (state) show(state);
  };

  place("api").addEventListener("change", (event) => turn(event.target.value));
  document.addEventListener("visibilitychange", () => document.hidden || poll());
  for (const event of ["timeupdate", "seeking", "loadedmetadata"]) film.addEventListener(event, showHead);
  poll();
})();
