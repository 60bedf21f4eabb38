"use strict";
// Comfort only: without scripts every panel is shown and every table is whole.
for (const box of document.querySelectorAll("[data-tabs]")) {
  const panels = [...box.children].filter((child) => child.dataset.label !== undefined);
  if (panels.length < 2) continue;
  const list = document.createElement("div");
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", box.dataset.tabs);
  const tabs = panels.map((panel, i) => {
    const tab = document.createElement("button");
    tab.type = "button";
    tab.id = panel.id + "-tab";
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    tab.textContent = panel.dataset.label;
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", () => show(i));
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move) { const next = (i + move + tabs.length) % tabs.length; show(next); tabs[next].focus(); }
    });
    list.append(tab);
    return tab;
  });
  const show = (chosen) => panels.forEach((panel, i) => {
    panel.hidden = i !== chosen;
    tabs[i].setAttribute("aria-selected", String(i === chosen));
    tabs[i].tabIndex = i === chosen ? 0 : -1;
  });
  box.prepend(list);
  show(0);
}

const key = (cell) => {
  const text = cell.textContent.trim();
  const number = parseFloat(text.replace(/,/g, "").replace("−", "-"));
  return Number.isNaN(number) ? text.toLowerCase() : number;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a.cells[column]), key(b.cells[column])];
        const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

for (const box of document.querySelectorAll("[data-filters]")) {
  const items = [...box.querySelectorAll("[data-item]")];
  const bar = document.createElement("div");
  bar.className = "filters";
  const chosen = {};
  for (const name of box.dataset.filters.split(" ")) {
    const label = document.createElement("label");
    const select = document.createElement("select");
    label.append(name + " ", select);
    for (const value of ["all", ...new Set(items.map((item) => item.dataset[name]))]) select.append(new Option(value, value));
    select.addEventListener("change", () => {
      chosen[name] = select.value;
      for (const item of items) item.hidden = Object.entries(chosen).some(([k, v]) => v !== "all" && item.dataset[k] !== v);
    });
    bar.append(label);
  }
  box.prepend(bar);
}
