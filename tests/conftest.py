import os, warnings
import pytest


def pytest_addoption(parser): parser.addoption('--runslow', action='store_true', help='run the tests marked `slow` too')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--runslow') or os.environ.get('RUNSLOW', '0') != '0': return
    for item in items:
        if item.get_closest_marker('slow'): item.add_marker(pytest.mark.skip(reason='long draw: `pytest --runslow`'))


@pytest.fixture
def offline_weights(monkeypatch):
    "torchvision builders get random weights of the right shapes instead of a download"
    from torchvision import models as M
    def get_state_dict(self, *args, **kwargs):
        name = next(n for n in M.list_models() if M.get_model_weights(n) is type(self))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return M.get_model(name, weights=None).state_dict()
    monkeypatch.setattr(M.WeightsEnum, 'get_state_dict', get_state_dict)


@pytest.fixture
def photo_dls():
    "A function that makes `DataLoaders` of tiles of scikit-learn's two sample photographs"
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, PILImageBW, RandomSplitter
    from sklearn.datasets import load_sample_images
    tiles = [im[i:i+64, j:j+64] for im in load_sample_images().images for i in range(0, 384, 128) for j in range(0, 576, 128)]
    def make(*tfms, grey=False, bs=4, **kw):
        db = DataBlock((ImageBlock(PILImageBW) if grey else ImageBlock, CategoryBlock), get_x=lambda i: tiles[i][..., 1] if grey else tiles[i], get_y=lambda i: i < len(tiles)//2,
                       splitter=RandomSplitter(.3, seed=1), batch_tfms=list(tfms), **kw)
        return db.dataloaders(list(range(len(tiles))), bs=bs, num_workers=0)
    return make
