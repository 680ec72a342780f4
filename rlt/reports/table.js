// The table of all completions: sorted, filtered and paged in the page itself. Only one page of rows is in the
// document; every text is set as text, never as markup.
"use strict";

const SIZES = [10, 25, 100];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function shownNumber(value) {
  if (value === null) return "";
  return Number.isInteger(value) ? String(value) : Math.abs(value) >= 1e-3 ? value.toFixed(3) : value.toPrecision(2);
}

class CompletionTable {
  constructor(place) {
    this.place = place;
    this.columns = JSON.parse(place.querySelector("script").textContent).columns;
    this.count = this.columns.length ? this.columns[0].values.length : 0;
    this.page = 0;
    this.size = SIZES[0];
    this.sorted = null; // {column, down}
    this.filters = new Map(); // of a column: its test of a row's number
    this.search = "";
    this.build();
    this.update();
  }

  build() {
    const search = make("input", { type: "search", "aria-label": "search all texts", placeholder: "search all texts" });
    search.addEventListener("input", () => { this.search = search.value; this.update(); });
    this.status = make("span", { role: "status", "aria-live": "polite", class: "n status" });
    this.clear = make("button", { type: "button" }, "clear filters");
    this.clear.addEventListener("click", () => this.clearFilters());
    this.head = make("thead");
    this.body = make("tbody");
    const table = make("table", { "aria-label": `completions of ${this.place.dataset.name}` }, this.head, this.body);
    const bar = make("div", { class: "bar" }, search, this.clear, this.status);
    this.place.append(bar, this.chooser(), make("div", { class: "wide", tabindex: "0" }, table), this.pager());
    this.drawHead();
  }

  chooser() {
    const boxes = this.columns.map((column) => {
      const box = make("input", { type: "checkbox" });
      box.checked = column.shown;
      box.addEventListener("change", () => { column.shown = box.checked; this.drawHead(); this.draw(); });
      return make("label", {}, box, ` ${column.name}`);
    });
    return make("details", { class: "chooser" }, make("summary", {}, "columns"), ...boxes);
  }

  pager() {
    const turn = (text, label, target) => {
      const button = make("button", { type: "button", "aria-label": label }, text);
      button.addEventListener("click", () => { this.page = target(); this.draw(); });
      return button;
    };
    this.number = make("input", { type: "number", min: "1", "aria-label": "page" });
    this.number.addEventListener("change", () => { this.page = Number(this.number.value) - 1 || 0; this.draw(); });
    this.pages = make("span");
    const sizes = make("select", { "aria-label": "rows of a page" });
    for (const size of SIZES) sizes.append(make("option", { value: size }, `${size} rows`));
    sizes.addEventListener("change", () => {
      const first = this.page * this.size;
      this.size = Number(sizes.value);
      this.page = Math.floor(first / this.size);
      this.draw();
    });
    return make("nav", { class: "bar", "aria-label": "pages of completions" },
      turn("⇤", "first page", () => 0), turn("←", "page before", () => this.page - 1), this.number, this.pages,
      turn("→", "next page", () => this.page + 1), turn("⇥", "last page", () => this.last()), sizes);
  }

  drawHead() {
    const names = make("tr", {}, make("td"));
    const filters = make("tr", { class: "filters" }, make("td"));
    for (const column of this.columns.filter((one) => one.shown)) {
      const button = make("button", { type: "button" }, column.name.replaceAll("_", " "));
      button.addEventListener("click", () => this.sortBy(column));
      column.header = make("th", { scope: "col", class: column.kind }, button);
      names.append(column.header);
      filters.append(make("td", { class: column.kind }, ...this.filterFields(column)));
    }
    this.head.replaceChildren(names, filters);
    this.markSorted();
  }

  filterFields(column) {
    column.asked ??= ["", ""];
    const field = (place, label, attributes) => {
      const input = make("input", { "aria-label": `${column.name} ${label}`, ...attributes });
      input.value = column.asked[place];
      input.addEventListener("input", () => { column.asked[place] = input.value; this.setFilter(column); });
      return input;
    };
    if (column.kind === "text") return [field(0, "contains", { type: "search", placeholder: "contains" })];
    if (column.kind === "number") {
      const number = { type: "number", step: "any" };
      return [field(0, "at least", { ...number, placeholder: "min" }), field(1, "at most", { ...number, placeholder: "max" })];
    }
    const select = make("select", { "aria-label": `${column.name} is` });
    for (const text of ["", "yes", "no"]) select.append(make("option", { value: text }, text || "all"));
    select.value = column.asked[0];
    select.addEventListener("input", () => { column.asked[0] = select.value; this.setFilter(column); });
    return [select];
  }

  setFilter(column) {
    const [first, second] = column.asked;
    if (first === "" && second === "") this.filters.delete(column);
    else if (column.kind === "text") this.filters.set(column, this.containing(column, first));
    else if (column.kind === "flag") this.filters.set(column, (row) => column.values[row] === (first === "yes"));
    else {
      const [least, most] = [first === "" ? -Infinity : Number(first), second === "" ? Infinity : Number(second)];
      this.filters.set(column, (row) => {
        const value = column.values[row];
        return value !== null && value >= least && value <= most;
      });
    }
    this.update();
  }

  // A text that many rows share is looked at once.
  containing(column, words) {
    const wanted = words.toLowerCase();
    column.lower ??= column.texts.map((text) => text.toLowerCase());
    const found = column.lower.map((text) => text.includes(wanted));
    return (row) => column.values[row] !== null && found[column.values[row]];
  }

  clearFilters() {
    this.filters.clear();
    this.search = this.place.querySelector(".bar input").value = "";
    for (const column of this.columns) column.asked = ["", ""];
    this.drawHead();
    this.update();
  }

  // Numbers from the largest, texts from A; then the other way, then as in the files.
  sortBy(column) {
    const downFirst = column.kind !== "text";
    if (this.sorted?.column !== column) this.sorted = { column, down: downFirst };
    else if (this.sorted.down === downFirst) this.sorted = { column, down: !downFirst };
    else this.sorted = null;
    this.markSorted();
    this.update();
  }

  markSorted() {
    for (const column of this.columns) {
      const way = this.sorted?.column === column ? (this.sorted.down ? "descending" : "ascending") : "none";
      column.header?.setAttribute("aria-sort", way);
    }
  }

  // Rows without a value come last, whichever way.
  sortKeys(column) {
    if (column.kind !== "text") return column.values;
    if (!column.places) {
      const compare = new Intl.Collator(undefined, { numeric: true }).compare;
      const sorted = column.texts.map((_, place) => place).sort((a, b) => compare(column.texts[a], column.texts[b]));
      column.places = [];
      sorted.forEach((text, place) => { column.places[text] = place; });
    }
    return column.values.map((value) => (value === null ? null : column.places[value]));
  }

  update() {
    const texts = this.columns.filter((column) => column.kind === "text");
    const searched = this.search === "" ? [] : texts.map((column) => this.containing(column, this.search));
    const tests = [...this.filters.values()];
    this.rows = [];
    for (let row = 0; row < this.count; row += 1) {
      const found = !searched.length || searched.some((test) => test(row));
      if (found && tests.every((test) => test(row))) this.rows.push(row);
    }
    if (this.sorted) {
      const keys = this.sortKeys(this.sorted.column);
      const sign = this.sorted.down ? -1 : 1;
      this.rows.sort((a, b) => (keys[a] === null) - (keys[b] === null) || sign * (keys[a] - keys[b]) || a - b);
    }
    this.page = 0;
    this.draw();
  }

  last() {
    return Math.max(0, Math.ceil(this.rows.length / this.size) - 1);
  }

  draw() {
    this.page = Math.min(Math.max(0, Math.trunc(this.page)), this.last());
    const first = this.page * this.size;
    const rows = this.rows.slice(first, first + this.size);
    this.body.replaceChildren(...rows.map((row) => this.row(row)));
    this.number.value = this.page + 1;
    this.number.max = this.last() + 1;
    this.pages.textContent = `of ${this.last() + 1}`;
    const [back, forward] = [this.page === 0, this.page === this.last()];
    const buttons = this.place.querySelectorAll("nav button");
    // Not `disabled`, which would take the focus away.
    [back, back, forward, forward].forEach((ended, place) => buttons[place].setAttribute("aria-disabled", ended));
    const filtered = this.rows.length < this.count ? ` (of ${this.count} in all)` : "";
    this.status.textContent = rows.length
      ? `${first + 1} to ${first + rows.length} of ${this.rows.length}${filtered}` : `no completion is left${filtered}`;
  }

  value(column, row) {
    const value = column.values[row];
    if (column.kind === "text") return value === null ? "" : column.texts[value];
    if (column.kind === "flag") return value === null ? "" : value ? "yes" : "no";
    return shownNumber(value);
  }

  row(row) {
    const button = make("button", { type: "button", "aria-expanded": "false", "aria-label": "the whole completion" }, "▸");
    const line = make("tr", {}, make("td", {}, button));
    for (const column of this.columns.filter((one) => one.shown)) {
      const text = this.value(column, row);
      line.append(make("td", { class: column.kind }, column.kind === "text" ? make("div", { class: "cut" }, text) : text));
    }
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      button.textContent = open ? "▸" : "▾";
      if (open) line.nextSibling.remove();
      else line.after(this.whole(row));
    });
    return line;
  }

  whole(row) {
    const asked = make("div");
    const written = make("div");
    const numbers = [];
    for (const column of this.columns) {
      const text = this.value(column, row);
      if (column.kind !== "text") numbers.push(`${column.name} ${text || "none"}`);
      else (["question", "solution"].includes(column.name) ? asked : written).append(
        make("h4", {}, column.name), make("pre", {}, text));
    }
    const cell = make("td", { colspan: this.columns.filter((one) => one.shown).length + 1 },
      make("p", { class: "n" }, numbers.join(", ")), make("div", { class: "beside" }, asked, written));
    return make("tr", { class: "whole" }, cell);
  }
}

for (const place of document.querySelectorAll(".completions")) new CompletionTable(place);
