"use strict";
// Tables sort at a click on a name; commands copy; an open page of a running training loads itself anew.
// What the reader did (order of tables, folds, scrolling) outlives that.
(() => {
  const said = document.getElementById("said");
  let silence = 0;
  const say = (text) => {
    said.textContent = text;
    clearTimeout(silence);
    silence = setTimeout(() => { said.textContent = ""; }, 2500);
  };
  const memory = {
    key: location.pathname + "#",
    get(name) { try { return JSON.parse(sessionStorage.getItem(this.key + name)); } catch { return null; } },
    set(name, value) { try { sessionStorage.setItem(this.key + name, JSON.stringify(value)); } catch { /* full */ } },
  };

  const sort = (table, column, descending) => {
    const body = table.tBodies[0];
    const key = (row) => {
      const cell = row.cells[column];
      return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent.trim();
    };
    const empty = (value) => value === "–" || value === "";
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
      return descending ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
    [...table.tHead.rows[0].cells].forEach((head, place) => {
      if (place === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  };
  document.querySelectorAll("table").forEach((table, number) => {
    const kept = memory.get("table" + number);
    if (kept && kept[0] < table.tHead.rows[0].cells.length) sort(table, ...kept);
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const first = head.classList.contains("number");  // the largest number is what people look for first
        const now = head.getAttribute("aria-sort");
        const descending = now ? now === "ascending" : first;
        sort(table, column, descending);
        memory.set("table" + number, [column, descending]);
        say("sorted by " + head.textContent.trim());
      });
    });
  });

  const copy = async (text) => {
    try { await navigator.clipboard.writeText(text); return true; } catch { /* not allowed here: the old way */ }
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };
  document.querySelectorAll(".copy").forEach((button) => {
    button.addEventListener("click", async () => {
      const done = await copy(button.parentElement.querySelector("code").textContent);
      say(done ? "copied" : "could not be copied: select it and press Ctrl+C");
      button.focus();
    });
  });

  // A picture as a PNG of twice its size on the screen, in the colours that the page has now.
  const toPng = (svg, name) => {
    const style = getComputedStyle(document.documentElement);
    const box = svg.viewBox.baseVal, scale = 2 * Math.max(1, svg.clientWidth / box.width);
    const copied = svg.cloneNode(true);
    copied.setAttribute("width", box.width * scale);
    copied.setAttribute("height", box.height * scale);
    const text = new XMLSerializer().serializeToString(copied)
      .replace(/var\((--[a-z]+)\)/g, (_, variable) => style.getPropertyValue(variable).trim());
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = image.width;
      canvas.height = image.height;
      canvas.getContext("2d").drawImage(image, 0, 0);
      const link = document.createElement("a");
      link.href = canvas.toDataURL("image/png");
      link.download = name + ".png";
      link.click();
      say(link.download + " saved");
    };
    image.onerror = () => say("this browser cannot make a PNG of it");
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
  };
  document.querySelectorAll(".export").forEach((button) => {
    button.addEventListener("click", () => toPng(button.closest("figure").querySelector("svg"), button.dataset.name));
  });

  document.querySelectorAll("details").forEach((fold, number) => {
    if (memory.get("fold" + number)) fold.open = true;
    fold.addEventListener("toggle", () => memory.set("fold" + number, fold.open));
  });

  const every = Number(document.body.dataset.refresh || 0);
  if (every) {
    const button = document.getElementById("pause");
    let paused = Boolean(memory.get("paused"));
    const show = () => { button.textContent = paused ? "Go on" : "Pause"; };
    button.addEventListener("click", () => { paused = !paused; memory.set("paused", paused); show(); });
    show();
    setInterval(() => { if (!paused && !document.hidden) location.reload(); }, every * 1000);
  }
})();
