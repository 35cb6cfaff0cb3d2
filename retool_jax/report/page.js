'use strict';
// Text of models and tools is never parsed as HTML: everything goes through textContent.
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const button = (text, action) => { const b = make('button', '', text); b.type = 'button'; b.onclick = action; return b; };

// ---- charts: a cursor that reads the lines out ----------------------------------------------

const readNumber = (value, unit) => unit === '%' ? (100 * value).toFixed(1) + ' %' :
  (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e7) || value === 0 ? String(+value.toPrecision(4)) : value.toExponential(2);

for (const figure of document.querySelectorAll('.chart')) {
  const svg = figure.querySelector('svg'), cursor = figure.querySelector('.cursor');
  const readout = figure.appendChild(make('div', 'readout'));
  let data = null;
  const hide = () => { cursor.style.visibility = 'hidden'; readout.style.display = 'none'; };
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('pointermove', event => {
    data = data || JSON.parse(figure.dataset.chart);
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const px = (event.clientX - box.left) * scale;
    const want = data.x0 + (px - data.left) / (data.right - data.left) * (data.x1 - data.x0);
    const near = series => series.points.reduce((a, b) => Math.abs(b[0] - want) < Math.abs(a[0] - want) ? b : a);
    const lines = data.series.filter(s => !s.dots);
    const at = (lines.length ? lines : data.series).map(near)
      .reduce((a, b) => Math.abs(b[0] - want) < Math.abs(a[0] - want) ? b : a)[0];
    readout.replaceChildren(make('div', '', `${data.x_label} ${at}`));
    for (const series of data.series) {
      const point = near(series);
      if (point[0] !== at) continue;
      const row = make('div'), swatch = make('i', `swatch k-${series.colour}`);
      row.append(swatch, `${series.label}  ${readNumber(point[1], data.unit)}`);
      readout.append(row);
    }
    const x = data.left + (at - data.x0) / (data.x1 - data.x0) * (data.right - data.left);
    cursor.setAttribute('x1', x); cursor.setAttribute('x2', x);
    cursor.style.visibility = 'visible';
    readout.style.display = 'block';
    const left = x / scale + 14, flip = left + readout.offsetWidth > box.width;
    readout.style.left = (flip ? Math.max(0, x / scale - readout.offsetWidth - 8) : left) + 'px';
    readout.style.top = svg.offsetTop + 8 + 'px';
  });
}

// ---- the browser of episodes ---------------------------------------------------------------

const holder = document.getElementById('browser');
if (holder) {
  const index = JSON.parse(document.getElementById('index').textContent);
  const rows = index.rows.map((r, i) => ({
    i, part: index.parts[r[0]], step: r[1], problem: index.problems[r[2]], sample: r[3], value: r[4], correct: r[5] === 1,
    verdicts: r[6], stop: r[7], length: r[8], turns: r[9], empty: r[10] === 1,
  }));
  const [QUESTION, GOLD, FAMILY, SOURCE] = [1, 2, 3, 4];
  const HEIGHT = 56;
  const pick = {kind: '', step: '', family: '', result: '', verdict: '', stop: '', words: ''};
  let shown = rows, current = -1, asTokens = false;

  const tests = {
    kind: (r, v) => r.part.kind === v,
    step: (r, v) => r.part.step === +v,
    family: (r, v) => r.problem[FAMILY] === v,
    result: (r, v) => v === 'right' ? r.correct : v === 'wrong' ? !r.correct && r.value !== null : r.value === null,
    verdict: (r, v) => v === 'none' ? r.verdicts.length === 0 : r.verdicts.includes(v),
    stop: (r, v) => v === 'void' ? r.empty : r.stop === v,
    words: (r, v) => r.problem.some(x => x.toLowerCase().includes(v)),
  };
  const passing = except => rows.filter(r => Object.keys(pick).every(
    key => key === except || pick[key] === '' || tests[key](r, pick[key])));

  // Filters: every select lists only what the other filters leave, with its number of episodes.
  const bar = make('div', 'filters'), selects = {};
  const choices = {
    kind: r => [[r.part.kind, r.part.label]],
    step: r => r.part.step < 0 ? [] : [[String(r.part.step), String(r.part.step)]],
    family: r => r.problem[FAMILY] ? [[r.problem[FAMILY], r.problem[FAMILY].replaceAll('_', ' ')]] : [],
    result: r => [r.value === null ? ['none', 'not graded'] : r.correct ? ['right', 'right'] : ['wrong', 'wrong']],
    verdict: r => r.verdicts.length ? [...new Set(r.verdicts)].map(v => [v, v.replaceAll('_', ' ')]) : [['none', 'no call']],
    stop: r => [...(r.stop ? [[r.stop, r.stop]] : []), ...(r.empty ? [['void', 'void turn']] : [])],
  };
  const titles = {kind: 'Model or set', step: 'Step', family: 'Family', result: 'Reward', verdict: 'Verdict', stop: 'Ended by'};
  const known = {};  // every value of a filter, in a fixed order
  for (const key of Object.keys(choices)) {
    known[key] = new Map();
    for (const r of rows) for (const [value, title] of choices[key](r)) known[key].set(value, title);
    if (key === 'step') known.step = new Map([...known.step].sort((a, b) => a[0] - b[0]));
    if (key !== 'step' && key !== 'kind') known[key] = new Map([...known[key]].sort((a, b) => a[1] < b[1] ? -1 : 1));
    if (known[key].size === 0 || (known[key].size === 1 && key !== 'kind')) continue;
    const label = make('label', '', titles[key]), select = make('select');
    select.id = 'filter-' + key;
    select.onchange = () => { pick[key] = select.value; refresh(); };
    label.append(select); bar.append(label);
    selects[key] = select;
  }
  const label = make('label', 'grow', 'Problem'), search = make('input');
  search.type = 'search'; search.id = 'filter-words'; search.placeholder = 'words, a number, an id';
  search.oninput = () => { pick.words = search.value.trim().toLowerCase(); refresh(); };
  label.append(search);
  const clear = button('Clear', () => {
    for (const key of Object.keys(pick)) pick[key] = '';
    search.value = '';
    refresh();
  });
  clear.id = 'clear';
  bar.append(label, clear);

  const list = make('div', 'list'), count = make('p', 'count'), space = make('div'), viewer = make('article', 'viewer');
  list.tabIndex = 0; list.id = 'list'; count.id = 'count'; viewer.id = 'viewer';
  list.setAttribute('role', 'listbox'); list.setAttribute('aria-label', 'Episodes');
  count.setAttribute('aria-live', 'polite');
  list.append(space);
  const side = make('div', 'side'), panes = make('div', 'panes');
  side.append(count, list); panes.append(side, viewer); holder.append(bar, panes);

  function fillSelects() {
    for (const [key, select] of Object.entries(selects)) {
      const counts = new Map();
      for (const r of passing(key)) for (const [value] of choices[key](r)) counts.set(value, (counts.get(value) || 0) + 1);
      const options = [new Option('all', '')];
      for (const [value, title] of known[key]) {
        if (counts.has(value) || pick[key] === value) options.push(new Option(`${title} (${counts.get(value) || 0})`, value));
      }
      select.replaceChildren(...options);
      select.value = pick[key];
    }
  }

  function refresh() {
    fillSelects();
    shown = passing('');
    count.textContent = `${shown.length.toLocaleString('en')} of ${rows.length.toLocaleString('en')} episodes`;
    space.style.height = shown.length * HEIGHT + 'px';
    list.scrollTop = 0;
    drawList();
    if (!shown.some(r => r.i === current)) open(shown.length ? shown[0].i : -1, false);
    else showPosition();
  }

  // Only the rows in sight exist.
  function drawList() {
    const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 4);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + 4);
    const made = [];
    for (let n = first; n < last; n++) {
      const r = shown[n], row = make('div', 'row k-' + (r.value === null ? 'base' : r.correct ? 'right' : 'wrong'));
      row.style.top = n * HEIGHT + 'px';
      row.setAttribute('role', 'option');
      row.setAttribute('aria-selected', r.i === current);
      row.dataset.i = r.i;
      const meta = make('div', 'meta');
      meta.append(r.part.label + (r.part.step >= 0 ? ` · step ${r.part.step}` : ''));
      for (const v of new Set(r.verdicts)) {
        const times = r.verdicts.filter(x => x === v).length;
        meta.append(make('span', 'chip ' + v, v.replaceAll('_', ' ') + (times > 1 ? ` ×${times}` : '')));
      }
      row.append(make('div', '', r.problem[QUESTION]), meta);
      made.push(row);
    }
    space.replaceChildren(...made);
  }
  list.addEventListener('scroll', drawList, {passive: true});
  list.addEventListener('click', event => {
    const row = event.target.closest('.row');
    if (row) open(+row.dataset.i, true);
  });
  list.addEventListener('keydown', event => {
    const move = {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10}[event.key];
    if (move) { event.preventDefault(); step(move); }
  });
  addEventListener('resize', drawList);

  function step(by) {
    const at = shown.findIndex(r => r.i === current);
    const next = Math.max(0, Math.min(shown.length - 1, at + by));
    if (!shown.length || next === at) return;
    if (next * HEIGHT < list.scrollTop) list.scrollTop = next * HEIGHT;
    if ((next + 1) * HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = (next + 1) * HEIGHT - list.clientHeight;
    open(shown[next].i, true);
  }

  const position = make('span', 'count');
  function showPosition() {
    const at = shown.findIndex(r => r.i === current);
    position.textContent = at < 0 ? '' : `${at + 1} / ${shown.length}`;
  }

  function open(i, remember) {
    current = i;
    drawList();
    showPosition();
    if (i < 0) { viewer.replaceChildren(make('p', 'note', 'No episode passes these filters.')); return; }
    if (remember) history.replaceState(null, '', '#episode-' + i);
    const r = rows[i], body = JSON.parse(document.getElementById('e' + i).textContent);
    const top = make('div', 'bar-top'), toggle = button('Tokens', () => { asTokens = !asTokens; open(current, false); });
    toggle.id = 'tokens';
    toggle.setAttribute('aria-pressed', asTokens && !!body.t);
    toggle.disabled = !body.t;
    toggle.title = body.t ? 'every token with its author and log probability' : 'left out to keep this file small';
    top.append(button('‹ previous', () => step(-1)), button('next ›', () => step(1)), position, make('span', 'fill'), toggle);
    const about = make('div', 'about');
    const fact = (name, value) => { const s = make('span', '', name + ' '); s.append(make('b', '', value)); about.append(s); };
    about.append(r.value === null ? make('span', 'chip', 'not graded') :
      make('span', 'chip ' + (r.correct ? 'right' : 'wrong'), `${r.correct ? 'right' : 'wrong'} · reward ${+r.value.toFixed(3)}`));
    if (r.empty) about.append(make('span', 'chip void', 'void turn'));
    fact('gold', r.problem[GOLD]);
    if (body.r) {
      fact('boxed', body.r[0] || '–');
      if (r.correct !== !!body.r[1]) fact('as a string', body.r[1] ? 'equal' : 'different');
      if (r.correct !== !!body.r[2]) fact('lenient rule', body.r[2] ? 'right' : 'wrong');
    }
    fact('ended by', r.stop || '–'); fact('turns', r.turns); fact('tokens written', r.length); fact('sample', r.sample);
    fact('from', r.part.name); if (r.problem[FAMILY]) fact('family', r.problem[FAMILY]); fact('problem', r.problem[0]);
    viewer.replaceChildren(top, make('h3', '', r.problem[QUESTION]), about, asTokens && body.t ? tokenView(body) : textView(body));
  }

  // ---- as text: the model's words, its code, what the interpreter said ----
  function textView(body) {
    const said = make('div', 'said'), answered = new Map(body.c.filter(c => c[0] >= 0).map(c => [c[0], c]));
    body.s.forEach(([kind, text], n) => {
      if (kind === 'p') {
        const box = make('details'), words = make('div', 'said', text);
        box.append(make('summary', '', 'Prompt'), words);
        said.append(box);
      } else if (kind === 'm') {
        modelText(said, text);
      } else {
        const call = answered.get(n), out = make('span', 'tool' + (call && call[1] !== 'ok' ? ' bad' : ''));
        if (call) out.append(callLabel(call));
        tagged(out, text.replace(/^\n/, '').replace(/\n+$/, ''));
        said.append(out);
        if (call) hiddenOutput(said, call);
      }
    });
    for (const call of body.c.filter(c => c[0] < 0)) {
      const out = make('span', 'tool bad');
      out.append(callLabel(call), make('span', 'tag', 'nothing was fed back: the episode ended here'));
      said.append(out);
      hiddenOutput(said, call);
    }
    return said;
  }

  function callLabel(call) {
    const label = make('span', 'label');
    label.append(make('span', 'chip ' + call[1], call[1].replaceAll('_', ' ')));
    if (call[2] > 0) label.append(` ${(1000 * call[2]).toPrecision(3)} ms`);
    return label;
  }

  function hiddenOutput(said, call) {
    ['stdout', 'stderr'].forEach((name, n) => {
      if (!call[3 + n]) return;
      const box = make('details');
      box.append(make('summary', '', `whole ${name} (the model saw ${call[0] < 0 ? 'none of it' : 'the text above'})`), make('div', 'said', call[3 + n]));
      said.append(box);
    });
  }

  // The model's text cut at its own tags, for colour only.
  function modelText(said, text) {
    const form = /<code>[\s\S]*?(?:<\/code>|$)|<answer>[\s\S]*?(?:<\/answer>|$)/g;
    let at = 0;
    for (const match of text.matchAll(form)) {
      tagged(said, text.slice(at, match.index));
      at = match.index + match[0].length;
      if (match[0].startsWith('<code>')) {
        const block = make('span', 'code');
        highlight(block, match[0]);
        said.append(block);
        if (text[at] === '\n') at++;  // the block ends the line already
      } else {
        const answer = make('span', 'answer');
        tagged(answer, match[0]);
        said.append(answer);
      }
    }
    tagged(said, text.slice(at));
  }

  function tagged(node, text) {
    let at = 0;
    for (const match of text.matchAll(/<\/?(?:code|interpreter|answer|think)>/g)) {
      node.append(text.slice(at, match.index), make('span', 'tag', match[0]));
      at = match.index + match[0].length;
    }
    node.append(text.slice(at));
  }

  const WORDS = new Set(('False None True and as assert async await break class continue def del elif else except finally for ' +
    'from global if import in is lambda nonlocal not or pass raise return try while with yield').split(' '));
  const PYTHON = /(<\/?code>|^```\w*$)|(#.*)|('''[\s\S]*?'''|"""[\s\S]*?"""|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*")|(\b\d[\w.]*)|([A-Za-z_]\w*)/gm;
  function highlight(node, code) {
    let at = 0;
    for (const match of code.matchAll(PYTHON)) {
      const kind = match[1] ? 'tag' : match[2] ? 'com' : match[3] ? 'str' : match[4] ? 'num' : WORDS.has(match[5]) ? 'kw' : '';
      if (!kind) continue;
      node.append(code.slice(at, match.index), make('span', kind, match[0]));
      at = match.index + match[0].length;
    }
    node.append(code.slice(at));
  }

  // ---- as tokens: who wrote each, and how likely it was ----
  const CHUNK = 2000;
  function expand(runs) {
    const out = [];
    for (let n = 0; n < runs.length; n += 2) for (let k = 0; k < runs[n + 1]; k++) out.push(runs[n]);
    return out;
  }
  function tokenView(body) {
    const {ids} = body.t, acted = expand(body.t.acted), versions = expand(body.t.versions);
    const whole = make('div'), bar = make('div', 'tokenbar'), tokens = make('div', 'tokens');
    tokens.id = 'token-view'; bar.id = 'token-facts';
    const legend = () => {
      const scale = make('span');
      scale.append('written by the model, likely ', make('i', 'scale'), ' unlikely');
      bar.replaceChildren(scale, make('span', '', 'hatched: prompt and interpreter, masked out of the loss'),
        make('span', '', 'point at a token'));
    };
    legend();
    let at = 0, mine = 0;
    const more = button('', () => draw());
    function draw() {
      more.remove();
      const stop = Math.min(ids.length, at + CHUNK);
      for (; at < stop; at++) {
        const text = index.vocabulary[ids[at]] ?? `⟨${ids[at]}⟩`, own = acted[at] === 1;
        const token = make('span', own ? 'acted' : 'fed', text === '' ? '∅' : text.replace(/\n/g, '⏎\n'));
        token.dataset.n = at;
        if (own) {
          const logprob = body.t.logprobs[mine];
          token.dataset.v = versions[mine++];
          if (logprob !== null) {  // a server's are not known
            token.dataset.l = logprob;
            token.style.setProperty('--u', Math.min(1, -logprob / 5000).toFixed(3));
          }
        }
        tokens.append(token);
      }
      if (at < ids.length) {
        more.textContent = `${ids.length - at} more tokens`;
        tokens.append(more);
      }
    }
    draw();
    tokens.addEventListener('pointerover', event => {
      const token = event.target.closest('span');
      if (!token || token.dataset.n === undefined) return;
      const id = ids[token.dataset.n], logprob = token.dataset.l / 1000;
      bar.replaceChildren(make('b', '', JSON.stringify(index.vocabulary[id] ?? '')), make('span', '', `id ${id}`),
        make('span', '', `position ${token.dataset.n}`));
      if (token.className === 'acted') {
        if (!Number.isNaN(logprob)) {
          bar.append(make('span', '', `log p ${logprob.toFixed(3)}`), make('span', '', `p ${(100 * Math.exp(logprob)).toFixed(1)} %`));
        }
        bar.append(make('span', '', `weights of version ${token.dataset.v}`), make('span', '', 'acted'));
      } else {
        bar.append(make('span', '', 'not acted: written by the template or the interpreter'));
      }
    });
    tokens.addEventListener('pointerleave', legend);
    whole.append(bar, tokens);
    return whole;
  }

  const asked = /^#episode-(\d+)$/.exec(location.hash);
  if (asked && rows[+asked[1]]) current = +asked[1];
  refresh();
  if (asked && rows[current]) {
    open(current, false);
    list.scrollTop = shown.findIndex(r => r.i === current) * HEIGHT;
    holder.scrollIntoView();
  }
}
