"The command as a user runs it, in processes of its own."
import json, subprocess, sys

import pytest


def normx(*args, cwd=None):
    code = 'from fastai_normx.cli import main; main()'
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, cwd=cwd)


def test_expected_table():
    r = normx('expected', 'tf_efficientnet_lite0', 'ResNet18_Weights.DEFAULT', 'convnext_small_in22k')
    head, lite, tv, old, note = r.stdout.splitlines()
    assert r.returncode == 0 and not r.stderr
    assert head.split() == ['name', 'mean', 'std', 'source']
    assert lite.split()[1:7] == ['0.5']*6 and 'timm' in lite and 'in1k' in lite
    assert tv.split()[1:7] == '0.485 0.456 0.406 0.229 0.224 0.225'.split() and tv.endswith('ResNet18_Weights.IMAGENET1K_V1')
    assert 'deprecated' in note


def test_expected_json_and_errors():
    r = normx('expected', 'resnet50.a1_in1k', 'resnet5O', 'inception_v3', '--json', '--n-in', 1)
    good, bad, inception = json.loads(r.stdout)
    assert r.returncode == 1
    assert good['mean'] == [pytest.approx(.458971)] and good['source'].endswith('resnet50.a1_in1k')
    assert set(bad) == {'name', 'error'} and 'Closest names' in bad['error']
    assert any('disagree' in n for n in inception['notes'])


def test_one_bad_name_does_not_cost_the_others(tmp_path):
    (tmp_path/'broken.json').write_text('{')
    r = normx('expected', 'resnet5O', 'resnet50', 'broken.json', './nothing.json', cwd=tmp_path)
    assert r.returncode == 1 and 'resnet50.a1_in1k' in r.stdout
    for msg in ('Closest names', 'not valid JSON', 'no file or folder'): assert msg in r.stderr
    assert 'Traceback' not in r.stderr


@pytest.mark.parametrize('args,code,text', [
    ([], 0, 'usage: normx COMMAND'), (['--help'], 0, 'demo'), (['--version'], 0, '.'), (['nonsense'], 1, "no command 'nonsense'"), (['expected'], 1, 'at least one name'),
    (['expected', '--help'], 0, '--n-in'), (['demo', '--help'], 0, '--epochs'), (['demo', '--nonsense'], 2, 'unrecognized arguments'),
])
def test_usage(args, code, text):
    r = normx(*args)
    assert r.returncode == code and text in r.stdout + r.stderr and 'Traceback' not in r.stderr


def test_demo_without_its_extra(tmp_path):
    code = "import sys; sys.modules['skimage'] = None; sys.argv = ['normx', 'demo']; from fastai_normx.cli import main; main()"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 1 and "pip install 'fastai_normx[demo]'" in r.stderr and 'Traceback' not in r.stderr


def test_arguments_in_the_other_order(tmp_path):
    r = normx('check', 'resnet18', tmp_path)
    assert r.returncode == 2 and '`normx check FOLDER NAME`' in r.stderr


def png(path, a):
    from PIL import Image
    Image.fromarray(a).save(path)


def test_exit_codes_of_check(tmp_path):
    "0: they fit; 1: they do not; 2: that cannot be told"
    import numpy as np
    rng = np.random.default_rng(0)
    for name, make in dict(grey=lambda: rng.integers(30, 120, (32, 32), dtype=np.uint8), deep=lambda: rng.integers(0, 4096, (32, 32), dtype=np.uint16),
                           flat=lambda: np.full((32, 32, 3), 90, np.uint8)).items():
        (tmp_path/name).mkdir()
        for i in range(4): png(tmp_path/name/f'{i}.png', make())
    codes = {name: normx('check', tmp_path/name, 'resnet18') for name in ('grey', 'deep', 'flat')}
    assert {k: r.returncode for k, r in codes.items()} == dict(grey=0, deep=1, flat=2), codes
    assert '12 bits' in codes['deep'].stdout and '4095' in codes['deep'].stdout and 'of one colour' in codes['flat'].stdout
    r = normx('check', '', 'resnet18', cwd=tmp_path)
    assert r.returncode == 2 and 'normx check . NAME' in r.stderr
