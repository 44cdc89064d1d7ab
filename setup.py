import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
reqs = {k.removesuffix('requirements').strip('_'): v.split() for k,v in cfg['DEFAULT'].items()}
version = re.search(r"__version__ = ['\"](.+)['\"]", Path(__file__).with_name('fastai_normx').joinpath('__init__.py').read_text())[1]

setup(version=version, install_requires=reqs.pop(''), extras_require=reqs)
