"""The style sheet of the operator's page: light and dark, from 320 pixels of width; the CSP header allows its hash."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f4f5f7; --sheet: #fff; --ink: #1b1f24; --soft: #57606a; --edge: #d5d9de;
  --good: #1a7f37; --warn: #9a5b00; --bad: #b3261e; --link: #0a5fb4;
  --c1: #0a5fb4; --c2: #b35900; --c3: #1a7f37; --c4: #b3261e; --c5: #7a3fb0; --c6: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #111418; --sheet: #1a1f25; --ink: #e6e9ec; --soft: #a3abb5; --edge: #343b44;
    --good: #6fd08c; --warn: #ffb057; --bad: #ff8a80; --link: #7dbbff;
    --c1: #6cb2ff; --c2: #ffb057; --c3: #6fd08c; --c4: #ff8a80; --c5: #cda6ff; --c6: #a8b0ba;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.15rem; }
h2 { margin: 2rem 0 .6rem; font-size: 1.15rem; }
h3 { margin: 1.1rem 0 .4rem; font-size: 1rem; }
p { margin: .3rem 0; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
header { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; align-items: baseline; justify-content: space-between; }
header p, footer, .soft, .remark { color: var(--soft); font-size: .875rem; }
nav { font-size: .875rem; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .4rem 0 1rem; }
nav a { padding: .2rem 0; }
.state { border-left: .4rem solid var(--edge); border-radius: .4rem; background: var(--sheet); padding: .8rem 1rem;
  font-size: 1.25rem; }
.state.good { border-color: var(--good); } .state.warn { border-color: var(--warn); }
.state.bad { border-color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(2, 1fr); gap: .6rem; margin: 1rem 0 0; }
@media (min-width: 40rem) { .figures { grid-template-columns: repeat(4, 1fr); } }
.figures > div, figure, .wide { background: var(--sheet); border: 1px solid var(--edge); border-radius: .4rem; }
.figures > div { padding: .6rem .8rem; }
dt { font-size: .875rem; color: var(--soft); }
dd { margin: 0; }
.number { font-size: 1.5rem; font-variant-numeric: tabular-nums; line-height: 1.3; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: .6rem; }
figure { margin: 0; padding: .6rem .6rem .7rem; min-width: 0; }
figcaption { font-size: .875rem; padding: 0 .3rem; }
figcaption span { white-space: nowrap; }
figcaption ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 13px; fill: var(--soft); }
svg .y { text-anchor: end; } svg .x, svg .nothing { text-anchor: middle; }
.grid, .tick { stroke: var(--edge); fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.dashed { stroke-dasharray: 6 4; }
.area { opacity: .14; }
.key { display: inline-block; width: 1.1rem; height: .7rem; margin-right: .35rem; border-radius: .15rem; }
.key.dashed { background-image: linear-gradient(90deg, transparent 60%, var(--sheet) 60%); background-size: .4rem; }
.line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); } .line.c3 { stroke: var(--c3); }
.line.c4 { stroke: var(--c4); } .line.c5 { stroke: var(--c5); } .line.c6 { stroke: var(--c6); }
.bar.c1, .area.c1 { fill: var(--c1); } .bar.c2, .area.c2 { fill: var(--c2); } .bar.c3, .area.c3 { fill: var(--c3); }
.bar.c4, .area.c4 { fill: var(--c4); } .bar.c5, .area.c5 { fill: var(--c5); } .bar.c6, .area.c6 { fill: var(--c6); }
.key.c1 { background-color: var(--c1); } .key.c2 { background-color: var(--c2); }
.key.c3 { background-color: var(--c3); } .key.c4 { background-color: var(--c4); }
.key.c5 { background-color: var(--c5); } .key.c6 { background-color: var(--c6); }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: .6rem; }
.wide { overflow-x: auto; padding: .3rem .8rem .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding: .3rem 0; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-top: 1px solid var(--edge); vertical-align: top; }
th { font-weight: 600; }
.right { text-align: right; font-variant-numeric: tabular-nums; }
.errors { list-style: none; margin: 0; padding: .2rem .8rem; font-size: .9375rem; background: var(--sheet);
  border: 1px solid var(--edge); border-radius: .4rem; }
.errors li { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .35rem 0; border-top: 1px solid var(--edge); }
.errors li:first-child { border-top: 0; }
.errors time { color: var(--soft); font-variant-numeric: tabular-nums; }
.errors span { flex: 1 1 20rem; min-width: 0; }
details { margin-top: 1rem; }
summary { cursor: pointer; padding: .3rem 0; }
footer { margin-top: 2rem; border-top: 1px solid var(--edge); padding-top: .6rem; }
@media (forced-colors: active) { .key, .bar, .line, .area { forced-color-adjust: none; } }
"""

#: What a Content-Security-Policy allows this style sheet by (CSP 3, section 2.3.1).
STYLE_HASH = f"sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}"
