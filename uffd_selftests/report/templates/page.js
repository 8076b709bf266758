"use strict";
// Everything can be read without this script: it looks things up.
(() => {
  const form = document.querySelector(".filter");
  const text = document.getElementById("text");
  const topic = document.getElementById("topic");
  const differing = document.getElementById("differing");
  const boxes = [...form.querySelectorAll("input[type=checkbox][value]:not(#differing)")];
  const groups = [...document.querySelectorAll("#results .topic")].map((node) => ({
    node,
    name: node.dataset.topic,
    rows: [...node.querySelectorAll("tbody tr")].map((row) => ({
      row,
      outcomes: row.dataset.o,
      differs: "d" in row.dataset,
      text: `${row.id} ${row.cells[0].textContent}`.toLowerCase(),
    })),
  }));

  const apply = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = boxes.filter((box) => box.checked).map((box) => box.value);
    const different = Boolean(differing && differing.checked);
    const narrowed = words.length > 0 || wanted.length > 0 || different || topic.value !== "";
    let found = 0;
    for (const group of groups) {
      let here = 0;
      for (const { row, outcomes, differs, text: content } of group.rows) {
        const fits = (!topic.value || topic.value === group.name) && (!different || differs) &&
          (wanted.length === 0 || wanted.some((each) => outcomes.includes(each))) &&
          words.every((word) => content.includes(word));
        row.hidden = !fits;
        here += fits;
      }
      group.node.hidden = here === 0;
      group.node.open = narrowed && here > 0;
      found += here;
    }
    form.querySelector("output").value = narrowed ? `${found} of ${groups.reduce((sum, group) => sum + group.rows.length, 0)} cases` : "";
  };

  // An anchor inside of something folded or filtered away opens and shows it.
  const reveal = () => {
    let target = null;
    try {
      target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    } catch { /* no anchor of ours */ }
    if (!target) return;
    if (target.hidden || target.closest("[hidden]")) {
      form.reset();
      apply();
    }
    for (let node = target; node; node = node.parentElement) {
      if (node.tagName === "DETAILS") node.open = true;
    }
    const own = target.querySelector(":scope > th > details");
    if (own) own.open = true;
    target.scrollIntoView();
  };

  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", reveal);
  for (const link of document.querySelectorAll("[data-show]")) {
    link.addEventListener("click", () => {
      form.reset();
      for (const box of boxes) box.checked = box.value === link.dataset.show;
      apply();
    });
  }
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      event.preventDefault();
      text.focus();
    }
  });
  apply();
  reveal();
})();
