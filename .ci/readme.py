"Write README.md from nbs/index.ipynb, without Quarto"
import re
from pathlib import Path

from fastcore.nbio import dict2nb, read_nb
from nbconvert import MarkdownExporter
from nbformat import from_dict

root = Path(__file__).resolve().parent.parent

def readme():
    "The text of README.md"
    nb = read_nb(root/'nbs/index.ipynb')
    cells = [c for c in nb.cells if not re.search(r'^#\|\s*hide', c.source, re.M)]
    nb = from_dict(dict(nbformat=4, nbformat_minor=5, metadata={'language_info': {'name': 'python'}}, cells=[
        {k:v for k,v in c.items() if k in ('cell_type', 'source', 'outputs', 'metadata', 'execution_count', 'id')} for c in cells]))
    body = MarkdownExporter().from_notebook_node(nb)[0]
    body = re.sub(r'\]\(([\w/]+\.ipynb)\)', r'](nbs/\1)', body)
    return '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit that -->\n\n' + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf-8')
