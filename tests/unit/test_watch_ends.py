"""The end of the watching thread, with the process that it belongs to."""

from types import SimpleNamespace

from syncbn.multi_worker.watch import Watch


def watch_of(left):
    watch = Watch(SimpleNamespace(leave=lambda: left.append(1), peers=[]))
    watch._thread = SimpleNamespace(join=lambda **_: None)
    return watch


def test_a_forked_child_does_not_speak_for_its_parent_at_its_end(monkeypatch):
    """It inherits what runs at the end, and would wait for ever in TensorFlow's code."""
    left = []
    watch = watch_of(left)
    monkeypatch.setattr("os.getpid", lambda: -1)
    watch.stop()
    assert left == []
    monkeypatch.undo()
    watch.stop()
    assert left == [1]
