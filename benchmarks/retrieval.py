"Finding another crop of the same photograph among all: what a backbone without a classifier can be measured by"
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize as unit
from torchvision import transforms as T

SQUARE = 132  # pixels of the centre square of which two opposite corners are cropped


def corners(files, size):
    "uint8 crops `[N,3,size,size]` twice: the upper left and the lower right corner of each photograph's centre square"
    tfm = T.Compose([T.Resize(SQUARE, T.InterpolationMode.BICUBIC), T.CenterCrop(SQUARE), T.PILToTensor()])
    x = torch.stack([tfm(Image.open(f).convert('RGB')) for f in files])
    return x[..., :size, :size].contiguous(), x[..., -size:, -size:].contiguous()

def features(model, x, f, bs=10):
    "What `model` gives for `f` of uint8 images `x`: float32 `[N,F]`"
    with torch.inference_mode(): return torch.cat([model(f(b)) for b in x.split(bs)]).clone()

def nearest(query, gallery):
    "For each of `query` the place of the most similar (cosine) in `gallery`"
    return (unit(query, dim=1)@unit(gallery, dim=1).T).argmax(1)

def found(query, gallery):
    "1 for each of `query` whose most similar is its own photograph, else 0"
    return (nearest(query, gallery)==torch.arange(len(query))).numpy().astype(float)

def cosine(a, b): "Cosine distance, image by image"; return (1-torch.nn.functional.cosine_similarity(a, b)).numpy().astype(np.float64)
