"Write README.md from nbs/index.ipynb, without Quarto, and the picture in it from the tutorial that draws it"
import base64, re
from pathlib import Path

from fastcore.nbio import dict2nb, read_nb
from nbconvert import MarkdownExporter
from nbformat import from_dict

root = Path(__file__).resolve().parent.parent

def visible(c):
    "A cell as README shows it: no input where the notebook hides it, and no pictures, which GitHub could not find"
    c = {k:v for k,v in c.items() if k in ('cell_type', 'source', 'outputs', 'metadata', 'execution_count', 'id')}
    if c['cell_type'] != 'code': return c
    c['outputs'] = [o for o in c['outputs'] if 'image/png' not in o.get('data', {})]
    if not c['source'].startswith('#| echo: false'): return c
    return dict(cell_type='markdown', id=c['id'], metadata={}, source=''.join('```\n' + ''.join(o['text']).strip() + '\n```\n' for o in c['outputs'] if 'text' in o))

def readme():
    "The text of README.md"
    nb = read_nb(root/'nbs/index.ipynb')
    cells = [c for c in nb.cells if not re.search(r'^#\|\s*hide', c.source, re.M)]
    nb = from_dict(dict(nbformat=4, nbformat_minor=5, metadata={'language_info': {'name': 'python'}}, cells=[visible(c) for c in cells]))
    body = MarkdownExporter().from_notebook_node(nb)[0]
    body = re.sub(r'\]\(([\w/]+\.(?:ipynb|png))\)', r'](nbs/\1)', body)
    return '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit that -->\n\n' + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'

def picture():
    "The first picture in the saved outputs of the tutorial"
    nb = read_nb(root/'nbs/tutorials/why_normalize.ipynb')
    return base64.b64decode(next(o.data['image/png'] for c in nb.cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})))

if __name__ == '__main__':
    (root/'README.md').write_text(readme(), encoding='utf-8')
    (root/'nbs/images').mkdir(exist_ok=True)
    (root/'nbs/images/why_normalize.png').write_bytes(picture())
