"""How the page looks: light, dark, on paper, on a phone."""


def style(groups: int) -> str:
    """The page's style sheet. A group whose box is not ticked has its curves hidden; where the pointer or the keyboard
    is on a group's box, the other groups' curves fade."""
    rules = ""
    for i in range(groups if groups > 1 else 0):
        rules += f"body:has(#show{i}:not(:checked)) .g{i} {{ display: none; }}\n"
        chosen = f":is(label:hover > #show{i}:checked, #show{i}:checked:focus-visible)"
        rules += f"@media screen {{ body:has({chosen}) .curve:not(.g{i}) {{ opacity: 0.12; }} }}\n"
    return STYLE + rules


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1b1b; --faint: #5f6368; --grid: #e3e3e3; --line: #c9ccd0; --link: #0b57a4;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --ink: #e6e6e6; --faint: #a3a8ae; --grid: #32363b; --line: #4a4f55;
    --link: #8ec5ff; --c0: #4ba3e3; --c1: #f0803c; --c2: #2fc49a; --c3: #e3a1c6; --c4: #f2b93b; --c5: #a5dcff;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 7rem; }
sub { line-height: 0; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem clamp(0.75rem, 3vw, 2rem) 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; padding-top: 0.5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.25rem; }
p { max-width: 48rem; margin: 0.5rem 0; }
a { color: var(--link); }
.note, small, figcaption { color: var(--faint); font-size: 0.875rem; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; background: var(--paper); padding: 0.5rem; z-index: 3; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; list-style: none; padding: 0; margin: 0.5rem 0; }
.groups { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; margin: 1rem 0 0;
  padding: 0.35rem 0.6rem; max-height: min(6.4rem, 22vh); overflow-y: auto; background: var(--paper);
  border: 1px solid var(--line); border-radius: 4px; font-size: 0.875rem; }
.groups label { display: inline-flex; align-items: center; gap: 0.35rem; min-height: 1.6rem; overflow-wrap: anywhere; }
.groups input { margin: 0; width: 1rem; height: 1rem; accent-color: var(--link); flex: none; }
.swatch { width: 2.25rem; height: 0.625rem; flex: none; vertical-align: middle; margin-right: 0.35rem; }
.swatch line { stroke-width: 2.5; }
.grid { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0.75rem 1.5rem; align-items: start; }
@media (min-width: 42rem) { .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .span2, .span3 { grid-column: span 2; } .span1 .grid { grid-template-columns: minmax(0, 1fr); } }
@media (min-width: 66rem) { .grid { grid-template-columns: repeat(3, minmax(0, 1fr)); } .span3 { grid-column: span 3; }
  .span1 .grid { grid-template-columns: minmax(0, 1fr); }
  .span2 .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
figure { margin: 0; max-width: 36rem; }
figure.scroll { max-width: none; }
figure svg { display: block; width: 100%; height: auto; fill: currentColor; overflow: visible; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.wide { min-width: 44rem; max-width: 62rem; }
.scroll { overflow-x: auto; margin: 0.5rem 0; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding: 0.25rem 0; }
th, td { text-align: left; vertical-align: top;
  padding: 0.35rem 0.75rem 0.35rem 0; border-bottom: 1px solid var(--grid); }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 600; min-width: 8rem; }
th code { overflow-wrap: normal; }
td { min-width: 6.5rem; }
table.values td { min-width: 6rem; overflow-wrap: anywhere; }
table.remarks td:nth-child(4) { min-width: 18rem; }
table.samples { width: 100%; }
table.samples th, table.samples td { min-width: 3rem; }
table.samples tbody th { font-weight: 400; }
.text { font-family: ui-monospace, "DejaVu Sans Mono", Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; min-width: 9rem; unicode-bidi: isolate; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Consolas, monospace; font-size: 0.92em;
  overflow-wrap: anywhere; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; padding: 0.15rem 0; color: var(--link); }
.small > summary, .small > dl { font-size: 0.8125rem; }
dl { margin: 0.25rem 0; font-size: 0.875rem; max-width: 60rem; }
dt { margin-top: 0.35rem; font-weight: 600; }
dd { margin: 0 0 0 1.25rem; }
@page { margin: 1.4cm; }
@media print {
  :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --faint: #444444; --grid: #dddddd; --line: #999999;
    --link: #000000; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .skip, details:not([open]) { display: none; }
  .groups { position: static; max-height: none; }
  .groups label:has(input:not(:checked)) { display: none; }
  .groups input { display: none; }
  figure, tr, .swatch { break-inside: avoid; }
  h2, h3 { break-after: avoid; margin-top: 1rem; }
  .scroll { overflow: visible; }
  .wide { min-width: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
