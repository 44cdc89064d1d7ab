"However a fit ends, wherever a callback raises, cancels or takes the logger away: nothing of `ActivationLogger` is left on the model or the learner."
import copy, io, itertools, warnings

import pytest
import torch
from torch import nn

warnings.filterwarnings('ignore', category=FutureWarning)
from fastai.basics import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
                           CancelTrainException, CancelValidException, DataLoaders, Learner)
from fastai.data.load import DataLoader
from fastai.learner import load_learner
from fastai_normx.activations import ActivationLogger, ActivationLoggerWarning
from test_activations import in_two_processes

pytestmark = pytest.mark.filterwarnings('error::fastai_normx.activations.ActivationLoggerWarning', 'error::fastai_normx.activations.ActivationWarning')

whole = ['before_fit', 'before_epoch', 'before_train', 'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit']
training = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch']
events = [(e, None) for e in whole] + [(e, True) for e in training] + [(e, False) for e in training if 'step' not in e and 'backward' not in e]
raised = [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelTrainException, CancelValidException, CancelEpochException, CancelFitException,
          CancelBackwardException, CancelStepException]
last = ActivationLogger.order+1
where = {None: '', True: ' in training', False: ' in validation'}


class Items(list):
    "A dataset that a learner can be exported with"
    def new_empty(self): return Items()


class At(Callback):
    "Call `f` at the second occurrence of `event`, or at the only one, in training, in validation or anywhere"
    def __init__(self, event, train, f, order):
        self.f, self.train, self.order, self.n = f, train, order, 0
        setattr(self, event, self.go)
    def go(self):
        if self.train is not None and self.train != self.learn.training: return
        self.n += 1
        if self.n == (1 if self.train is None else 2): self.f(self.learn)


def get_learner(path, *cbs):
    torch.manual_seed(0)
    items = Items(zip(torch.randn(6, 3), [0, 1]*3))
    dls = DataLoaders(DataLoader(items, bs=2), DataLoader(items, bs=2))
    learn = Learner(dls, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), loss_func=nn.CrossEntropyLoss(), cbs=cbs, path=path)
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == 'ProgressCallback'])
    learn.logger = None
    return learn


def traces(model):
    "All that could hold something of the logger: hooks and attributes of the model's modules"
    hooks = [len(v) for m in model.modules() for k, v in vars(m).items() if 'hook' in k and v is not None]
    tensors = sum(len(p._backward_hooks or ()) for p in model.parameters())
    return sum(hooks)+tensors, [sorted(vars(m)) for m in model.modules()]


def fit(learn, *cbs):
    learn.logger = lambda *a: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)
            learn.fit(1, cbs=cbs)
    except BaseException as e: return e
    finally: learn.logger = None


def check(learn, al, clean, waits=False, x=torch.randn(4, 3)):
    """The learner and its model are as without a logger, can be copied, saved and exported, and the log can be read.
    `waits`: a batch whose call never came may wait for it, if no copy knows of it, and the next call is an ordinary one"""
    twins = copy.deepcopy(learn.model), torch.load(saved(learn.model), weights_only=False), export(learn).model
    for twin in twins:
        assert traces(twin) == clean
        assert torch.equal(twin.eval()(x), learn.model.eval()(x)) if not waits else True
    assert waits or traces(learn.model) == clean
    assert '_with_events' not in vars(learn)
    n = sum(map(len, al._hist.values()))
    assert torch.equal(learn.model.eval()(x), twins[0].eval()(x))
    assert traces(learn.model) == clean and sum(map(len, al._hist.values())) == n     # that was no batch of a fit
    if n: assert len(al.to_df()) >= n


def export(learn):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.export('a.pkl')
        return load_learner(learn.path/'a.pkl')


def saved(model):
    f = io.BytesIO()
    torch.save(model, f)
    f.seek(0)
    return f


everywhere = pytest.mark.parametrize('event,train,order', [
    pytest.param(e, t, o, id=f'{e}{where[t]}-{pos}') for e, t in events for o, pos in ((-50, 'before'), (last, 'after'))])


@everywhere
def test_nothing_is_left_wherever_a_callback_raises(event, train, order, tmp_path):
    for i, exc in enumerate(raised): raises(event, train, order, exc, bool((i+len(event)) % 2), tmp_path)


def raises(event, train, order, exc, grads, path):
    al = ActivationLogger(grads=grads)
    learn = get_learner(path, al)
    clean = traces(learn.model)
    def fail(learn): raise exc('x')
    at = At(event, train, fail, order)
    fit(learn, at)
    assert at.n, 'the event came'
    check(learn, al, clean, waits=event == 'before_batch' and order == last)
    fits = {m['fit'] for h in al._hist.values() for m in h.meta}
    assert fit(learn) is None       # and the next fit is recorded as if nothing had happened
    new = [m for h in al._hist.values() for m in h.meta if m['fit'] not in fits]
    assert [(m['split'], m['batch']) for m in new] == [(s, b) for s in ('train', 'valid') for b in range(3)]
    assert traces(learn.model) == clean


@everywhere
@pytest.mark.parametrize('how', ['remove_cb', 'reset'])
def test_nothing_is_left_wherever_the_logger_is_taken_away(event, train, order, how, tmp_path): taken_away(event, train, order, how, len(event) % 2 == 1, tmp_path)


def taken_away(event, train, order, how, grads, path):
    al = ActivationLogger(grads=grads)
    learn = get_learner(path, al)
    clean = traces(learn.model)
    at = At(event, train, (lambda l: l.remove_cb(al)) if how == 'remove_cb' else lambda l: al.reset(), order)
    assert fit(learn, at) is None and at.n
    check(learn, al, clean)
    if how == 'remove_cb': learn.add_cb(al)
    assert fit(learn) is None and len(al._hist['train']) >= 3
    assert traces(learn.model) == clean


@pytest.mark.parametrize('exc', [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('grads', [False, True])
def test_nothing_is_left_when_the_model_raises(exc, grads, tmp_path):
    al = ActivationLogger(grads=grads, to=tmp_path/'a.csv')
    learn = get_learner(tmp_path, al)
    clean, calls, real = traces(learn.model), [], learn.model[2].forward
    def forward(x):
        calls.append(1)
        if len(calls) == 2: raise exc('x')
        return real(x)
    learn.model[2].forward = forward
    assert isinstance(fit(learn), exc)
    del learn.model[2].forward
    check(learn, al, clean)
    assert len(al.to_df()) == 3+2       # all of the first batch, and what was seen of the second
    assert len((tmp_path/'a.csv').read_text().splitlines()) == 1+3+2


def test_a_batch_whose_loss_fails_is_in_the_file(tmp_path):
    al = ActivationLogger(to=tmp_path/'a.csv')
    learn = get_learner(tmp_path, al)
    def fail(learn): raise RuntimeError('x')
    fit(learn, At('after_loss', True, fail, 0))
    assert len((tmp_path/'a.csv').read_text().splitlines()) == 1+2*3


def test_what_a_failed_fit_left_unwritten_is_written_when_next_asked(tmp_path):
    import pandas as pd
    pytest.importorskip('pyarrow')
    def fail(learn): raise RuntimeError('x')
    for grads, ask in itertools.product((False, True), (lambda l, al: al.to_df(), lambda l, al: al.summary(), fit_again, lambda l, al: al.reset(), let_go)):
        f = tmp_path/f'{grads}{ask.__name__}{id(ask)}.parquet'
        learn = get_learner(tmp_path, al := ActivationLogger(to=f, grads=grads))
        fit(learn, At('after_loss', True, fail, 0))
        ask(learn, al)
        if ask is let_go: learn = al = None; import gc; gc.collect()
        assert pd.read_parquet(f).query('fit==0 and split=="train"').step.nunique() >= 2-grads*(ask is let_go)


def fit_again(learn, al): fit(learn)
def let_go(learn, al): pass


def test_a_call_of_the_model_by_another_callback_is_no_batch(tmp_path):
    al = ActivationLogger()
    learn = get_learner(tmp_path, al)
    for event in ('before_batch', 'after_pred', 'after_batch'):
        fit(learn, *[At(event, True, lambda l: l.model(torch.randn(400, 3)), o) for o in (-50, last-2)])
    assert set(al.to_df().query('layer=="0"')['count']) == {8}


def test_a_full_disk_leaves_whole_rows(tmp_path):
    import pandas as pd
    resource = pytest.importorskip('resource')
    al = ActivationLogger(to=tmp_path/'a.csv')
    learn = get_learner(tmp_path, al)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))     # a write that goes further is cut off there, as on a full disk
    try:
        with pytest.warns(ActivationLoggerWarning, match='Writing to CSV failed and is given up'): learn.logger = lambda *a: None; learn.fit(2)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    df = pd.read_csv(tmp_path/'a.csv', dtype={'layer': str})
    assert 0 < len(df) < len(al.to_df()) and len(df) % 3 == 0
    assert df.layer.tolist() == ['0', '1', '3']*(len(df)//3) and df['std'].notna().all()


# ---- copies of a module, compiled code

class Twin(nn.Module):
    "Makes a momentum twin of its encoder in the first forward pass, and a pickle of it"
    def __init__(self): super().__init__(); self.enc, self.head, self.twin, self.n = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 2), [], 0
    def forward(self, x):
        if not self.twin: self.twin += [copy.deepcopy(self.enc), torch.load(saved(self.enc), weights_only=False), torch.optim.swa_utils.AveragedModel(self.enc)]
        x = self.enc(x)
        if self.n == 1: self.twin.append(copy.deepcopy(self.enc))
        self.n += 1
        return self.head(x)


@pytest.mark.parametrize('grads', [False, True])
def test_what_is_copied_or_saved_while_it_is_recorded_is_inert(grads, tmp_path):
    learn = get_learner(tmp_path, al := ActivationLogger(grads=grads))
    learn.model = Twin()
    learn.create_opt()
    assert fit(learn) is None
    n = al._rec.calls.sum()
    assert len(learn.model.twin) == 4 and al.to_df().groupby('layer').size().eq(6).all()
    x = torch.randn(4, 3)
    for twin in learn.model.twin: assert twin(x).shape == (4, 4)
    for twin in learn.model.twin: copy.deepcopy(twin)(x).sum().backward(); torch.load(saved(twin), weights_only=False)(x)
    assert al._rec.calls.sum() == n and 'fastai_normx' not in str(pickletools_of(learn.model.twin[0]))


def pickletools_of(model):
    import zipfile
    return zipfile.ZipFile(saved(model)).read('archive/data.pkl')


@pytest.mark.parametrize('event,train', [e for e in events if e[0] != 'before_fit'])
def test_a_model_can_be_copied_at_every_event(event, train, tmp_path):
    made = []
    learn = get_learner(tmp_path, al := ActivationLogger(grads=True))
    assert fit(learn, *[At(event, train, lambda l: made.append(copy.deepcopy(l.model)) or torch.optim.swa_utils.AveragedModel(l.model), o) for o in (-50, last)]) is None
    assert len(made) == 2 and all(traces(m) == traces(learn.model) for m in made) and len(al._hist['train']) == 3


def compiled(how):
    "A model compiled in part, and a backend that counts the graphs it gets"
    graphs = []
    def backend(gm, ex): graphs.append(gm); return gm.forward
    compile = dict(backend=backend, fullgraph=True)
    class M(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        def forward(self, x): return self.c(self.block(x))
        def block(self, x): return self.b(self.a(x).relu())
    m = M()
    if how == 'method': m.block = torch.compile(m.block, **compile)
    elif how == 'class method': M.block = torch.compile(M.block, **compile)
    elif how == 'forward': m.forward = torch.compile(m.forward, **compile)
    elif how == 'submodule in place': m.b.compile(**compile)
    elif how == 'in place': m.compile(**compile)
    elif how == 'whole': m = torch.compile(m, **compile)
    return m, graphs


def ops(graphs): return {str([n.target for n in g.graph.nodes if n.op != 'placeholder']) for g in graphs}


hows = ['method', 'class method', 'forward', 'submodule in place', 'in place', 'whole']


def without_logger(how, tmp_path):
    "The graphs of a fit that nobody records"
    torch._dynamo.reset()
    learn = get_learner(tmp_path)
    learn.model, graphs = compiled(how)
    learn.create_opt()
    assert fit(learn) is None
    return graphs


@pytest.mark.parametrize('how', hows)
@pytest.mark.parametrize('every', [1, 2])
def test_compiled_parts_are_recorded_and_stay_whole(how, every, tmp_path):
    if not hasattr(torch.compiler, 'set_stance'): pytest.skip('this torch cannot run a compiled model as written')
    torch._dynamo.reset()
    learn = get_learner(tmp_path, al := ActivationLogger(every=every, grads=True))
    learn.model, graphs = compiled(how)
    learn.create_opt()
    assert fit(learn) is None
    n = 2*len(range(0, 3, every))
    assert al.to_df().groupby('layer').size().to_dict() == dict(a=n, b=n, c=n)
    assert bool(graphs) == (every == 2)        # the others run compiled
    learn.remove_cb(al)
    assert fit(learn) is None
    assert ops(graphs) and ops(graphs) <= ops(without_logger(how, tmp_path))    # no graph is split or differs
    assert torch._dynamo.eval_frame._stance.stance == 'default'


@pytest.mark.parametrize('how', hows)
def test_torch_that_cannot_run_compiled_code_as_written(how, tmp_path, monkeypatch):
    monkeypatch.delattr(torch.compiler, 'set_stance', raising=False)
    torch._dynamo.reset()
    learn = get_learner(tmp_path, al := ActivationLogger(grads=True))
    learn.model, graphs = compiled(how)
    learn.create_opt()
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        learn.logger = lambda *a: None
        learn.fit(1)
    said = [str(w.message) for w in ws if issubclass(w.category, ActivationLoggerWarning)]
    assert len(said) == (how in ('in place', 'whole', 'forward')) and all('torch 2.6' in o for o in said), said
    learn.remove_cb(al)
    assert fit(learn) is None
    assert ops(graphs) and ops(graphs) <= ops(without_logger(how, tmp_path))


# ---- some processes only

def _some(rank, who, counts=None):
    "A fit of two processes that meet after it, of which `who` have a logger"
    from datetime import timedelta
    from fastai_normx import activations as A
    A._patience = timedelta(seconds=2)
    items = Items(zip(torch.randn(12, 3), [0, 1]*6))[:2*(counts or [6, 6])[rank]]
    dls = DataLoaders(DataLoader(items, bs=2), DataLoader(items, bs=2))
    learn = Learner(dls, nn.Linear(3, 2), loss_func=nn.CrossEntropyLoss())
    learn.logger = lambda *a: None
    al = ActivationLogger(sample=None)
    if rank in who: learn.add_cb(al)
    with warnings.catch_warnings(record=True) as ws, learn.no_bar():
        warnings.simplefilter('always')
        learn.fit(2)
    torch.distributed.barrier()
    said = [str(w.message) for w in ws if issubclass(w.category, ActivationLoggerWarning)]
    return (said, al.to_df().query('split=="train"')['count'].tolist()) if rank in who else None


def _first_only(rank): return _some(rank, [0])
def _second_only(rank): return _some(rank, [1])
def _uneven(rank): return _some(rank, [0, 1], [6, 4])


@pytest.mark.parametrize('work,who', [(_first_only, 0), (_second_only, 1)])
def test_a_logger_on_one_process_does_not_wait_for_the_others(work, who):
    said, counts = in_two_processes(work)[who]
    assert len(said) == 1 and said[0].startswith(f'1 of 2 processes have an ActivationLogger (rank {who})') and counts == [4]*12


def test_processes_with_different_numbers_of_batches_do_not_wait_for_each_other():
    for said, counts in in_two_processes(_uneven): assert not said and counts in ([8]*4+[4]*2+[8]*4+[4]*2, [8]*8)


@pytest.mark.parametrize('grads', [False, True])
@pytest.mark.parametrize('f', [lambda l, al: al.reset(), lambda l, al: l.remove_cb(al), lambda l, al: al.__setstate__(al.__getstate__())])
def test_what_happens_to_the_logger_within_the_call(f, grads, tmp_path):
    learn = get_learner(tmp_path, al := ActivationLogger(grads=grads))
    clean, n, real = traces(learn.model), [], learn.model[2].forward
    def forward(x):
        n.append(1)
        if len(n) == 2: f(learn, al)
        return real(x)
    learn.model[2].forward = forward
    assert fit(learn) is None
    del learn.model[2].forward
    check(learn, al, clean)


def test_distances_after_a_failed_fit_are_from_where_training_began(tmp_path):
    def fail(learn): raise RuntimeError('x')
    learn = get_learner(tmp_path, al := ActivationLogger())
    learn.model[1].running_mean += 1
    assert fit(learn) is None
    ref = al._rec.refs[1]
    fit(learn, At('after_loss', True, fail, 0))
    assert fit(learn) is None and al._rec.refs[1] is ref
