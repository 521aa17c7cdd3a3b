"""The spool: tokenized by one process or several, the same documents in the same order."""

import numpy as np
import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data import spool as spool_module
from rwkv_dpo.data.spool import open_spool
from rwkv_dpo.data.tokenizer import WorldTokenizer


@pytest.mark.parametrize("n_processes", [1, 3])
@pytest.mark.parametrize("n_texts", [0, 1, 2, 97])
def test_documents_come_back_in_any_order_whoever_tokenized_them(tmp_path, monkeypatch, n_processes, n_texts):
    monkeypatch.setattr(spool_module, "_BLOCK", 100)
    texts = [f"{i} é三 " * (i * 7 % 13) for i in range(n_texts)]
    encode = WorldTokenizer().encode
    with open_spool(tmp_path / "a", texts, n_processes) as spool:
        assert len(spool) == n_texts
        for i in np.random.default_rng(0).permutation(n_texts):
            assert spool[i].dtype == np.uint16
            assert spool[i].tolist() == [*encode(texts[i]), 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_fault_in_the_texts_comes_out_and_nothing_stays(tmp_path, monkeypatch, n_processes):
    monkeypatch.setattr(spool_module, "_BLOCK", 10)

    def texts():
        yield from ["good " * 5] * 20
        raise InputError("line 21: bad")

    with pytest.raises(InputError, match="line 21: bad"), open_spool(tmp_path / "a", texts(), n_processes):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named_with_the_file(tmp_path):
    message = r"none/a.bin: cannot be written: No such file"
    with pytest.raises(InputError, match=message), open_spool(tmp_path / "none" / "a.bin", ["x"], 1):
        pass
