"Write README.md from nbs/index.ipynb, without Quarto, the picture in it, and the one that links to the site show"
import base64, re
from pathlib import Path

from fastcore.nbio import dict2nb, read_nb
from nbconvert import MarkdownExporter
from nbformat import from_dict

root = Path(__file__).resolve().parent.parent

def visible(c):
    "A cell as README shows it: the picture where the notebook hides the code that draws it"
    c = {k:v for k,v in c.items() if k in ('cell_type', 'source', 'outputs', 'metadata', 'execution_count', 'id')}
    if c['cell_type'] != 'code' or not c['source'].startswith('#| echo: false'): return c
    return dict(cell_type='markdown', id=c['id'], metadata={}, source='![What the layers did](images/activations.png)')

def readme():
    "The text of README.md"
    nb = read_nb(root/'nbs/index.ipynb')
    cells = [c for c in nb.cells if not re.search(r'^#\|\s*hide', c.source, re.M)]
    nb = from_dict(dict(nbformat=4, nbformat_minor=5, metadata={'language_info': {'name': 'python'}}, cells=[visible(c) for c in cells]))
    body = MarkdownExporter().from_notebook_node(nb)[0]
    body = re.sub(r'\]\(([\w/]+\.(?:ipynb|png)(?:#[\w-]+)?)\)', r'](nbs/\1)', body)
    return '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit that -->\n\n' + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'

def picture(notebook):
    "The first picture in the saved outputs of `notebook`"
    nb = read_nb(root/'nbs'/notebook)
    return base64.b64decode(next(o.data['image/png'] for c in nb.cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})))

if __name__ == '__main__':
    (root/'README.md').write_text(readme(), encoding='utf-8')
    (root/'nbs/images').mkdir(exist_ok=True)
    (root/'nbs/images/why_normalize.png').write_bytes(picture('tutorials/why_normalize.ipynb'))
    (root/'nbs/images/activations.png').write_bytes(picture('index.ipynb'))
