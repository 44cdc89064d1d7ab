"""Between nbdev and a site without Quarto: `prepare` goes over what nbdev wrote to _proc, `finish` over the site that was made of it

Links of this project's own that lead nowhere stop the build."""
import json, re, sys, tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

root = Path(__file__).resolve().parent.parent
numbered = re.compile(r'\b\d\d[a-z]?_(\w+\.ipynb)')

def urls(): return tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']['urls']

# What nbdev wrote

def is_doc(c): return c['cell_type'] == 'code' and 'show_doc(' in ''.join(c['source'])
def markdowns(c): return [o['data'] for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]

def heading(m):
    "The heading of a documented name, which keeps its underscores, and the anchor that nbdev links to"
    return f"{m[1]} {m[2].replace('_', chr(92)+'_')} {{#{m[2].lower()}}}"

def tidy_doc(md):
    "A signature as a reader would write it: nbdev runs the module as `__main__`"
    return re.sub(r'(?m)^(#+) ([\w.]+)$', heading, md.replace('__main__.', ''), count=1)

def tidy(c):
    "Change cell `c` in place"
    if is_doc(c):
        for d in markdowns(c): d['text/markdown'] = tidy_doc(''.join(d['text/markdown']))
    for o in c.get('outputs', []):  # a warning looks like one, also where a lesson printed it
        if re.match(r'\w*Warning: ', ''.join(o.get('text', ''))): o['name'] = 'stderr'

def anchors(nb): return {a for c in nb['cells'] if is_doc(c) for d in markdowns(c) for a in re.findall(r'\{#(\S+)\}', d['text/markdown'])}

def unlink(text, known):
    "nbdev links every name in backticks, also those that no page documents: leave those as code"
    return re.sub(r'\[(`[^`]+`)\]\(/([\w/]+)\.html#([\w.]+)\)', lambda m: m[0] if m[3] in known.get(m[2], ()) else m[1], text)

def prepare(proc=root/'_proc'):
    "Name pages as nbdev and Quarto name them, mend what is documented, and leave out what Quarto alone reads"
    for p in proc.rglob('*.ipynb'): p.rename(p.with_name(numbered.sub(r'\1', p.name)))
    nbs = {p: json.loads(numbered.sub(r'\1', p.read_text(encoding='utf-8'))) for p in proc.rglob('*.ipynb')}
    for nb in nbs.values():
        for c in nb['cells']: tidy(c)
    known = {p.relative_to(proc).with_suffix('').as_posix(): anchors(nb) for p,nb in nbs.items()}
    for p,nb in nbs.items():
        for c in nb['cells']:
            if c['cell_type'] == 'markdown': c['source'] = unlink(''.join(c['source']), known)
            if c['cell_type'] == 'raw': c['source'] = re.sub(r'(?m)^output-file: .*\n', '', ''.join(c['source']))
            for d in markdowns(c): d['text/markdown'] = unlink(''.join(d['text/markdown']), known)
        p.write_text(json.dumps(nb), encoding='utf-8')
    settings = proc/'_quarto.yml'
    cfg = yaml.safe_load(numbered.sub(r'\1', settings.read_text(encoding='utf-8')))
    cfg['format'].pop('commonmark')
    cfg['format']['html'].pop('grid')
    cfg['website']['image'] = '/' + cfg['website']['image']  # from the root, also on a page in a folder
    cfg['website'] |= yaml.safe_load((proc/'nbdev.yml').read_text(encoding='utf-8'))['website']
    cfg['website']['site-url'] = urls()['Homepage']  # pictures for other sites need it; links do not
    cfg['project']['output-dir'] = '_docs'
    del cfg['metadata-files']
    settings.write_text(yaml.safe_dump(cfg, sort_keys=False), encoding='utf-8')

# What was made of it

class Page(HTMLParser):
    "The anchors and links of a page"
    def __init__(self, text):
        super().__init__()
        self.ids,self.links = set(),[]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get('id'))
        if tag == 'a': self.links.append(attrs.get('href') or '')

def dead_links(docs):
    "`page: link` for each link to a page or an anchor that is not there"
    pages = {p.resolve(): Page(p.read_text(encoding='utf-8')) for p in docs.rglob('*.html')}
    dead = []
    for p,page in pages.items():
        for link in page.links:
            u = urlsplit(link)
            if u.scheme or u.netloc: continue
            to = (p.parent/unquote(u.path)).resolve() if u.path else p
            if to.is_dir(): to = to/'index.html'
            lost = u.fragment and to in pages and unquote(u.fragment) not in pages[to].ids
            if lost or not to.exists(): dead.append(f'{p.relative_to(docs.resolve())}: {link}')
    return dead

def internals(proc):
    "Pages of the sidebar's group of that name"
    cfg = yaml.safe_load((proc/'_quarto.yml').read_text(encoding='utf-8'))
    group = next(o for o in cfg['website']['sidebar']['contents'] if o.get('section') == 'Internals')
    return {o['href'].replace('.ipynb', '.html') for o in group['contents']}

def rank(entry, inner):
    "Search prefers a short heading that matches: those of internals are longer, and say what they are"
    if entry['href'].split('#')[0] in inner: entry['section'] = ' · '.join(filter(None, ('Internals', entry['title'], entry['section'])))
    if re.search(r'\bgrey', entry['text'], re.I): entry['text'] += ' gray'
    return entry

def finish(docs=root/'_docs', proc=root/'_proc'):
    "Order what search finds, and stop where a link is dead"
    f = docs/'search.json'
    inner = internals(proc)
    entries = [rank(e, inner) for e in json.loads(f.read_text(encoding='utf-8'))]
    f.write_text(json.dumps(entries, ensure_ascii=False), encoding='utf-8')
    if dead := dead_links(docs): sys.exit('Dead links:\n' + '\n'.join(dead))

if __name__ == '__main__': dict(prepare=prepare, finish=finish)[sys.argv[1]]()
