"""What other libraries raise becomes one sentence, whatever it is."""

import pytest

from redit_fast.foreign import Foreign


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ImportError("No package metadata was found for bitsandbytes\nsee there"),
         "it: ImportError: No package metadata was found for bitsandbytes see there"),
        (RuntimeError("One. Two."), "it: RuntimeError: One"),
        (AssertionError(), "it: AssertionError"),
        (MemoryError(), "it: MemoryError"),
        (SystemExit(3), "it: SystemExit: 3"),
        (OSError("no space"), "it: no space"),
        (OSError(), "it: OSError"),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence_of_its_type_and_words(error, sentence):
    with pytest.raises(ValueError) as raised, Foreign("it", plain=OSError):
        raise error
    assert str(raised.value) == sentence and raised.value.__cause__ is error


def test_ctrl_c_goes_on_as_it_is_and_nothing_is_changed_where_nothing_is_raised():
    with pytest.raises(KeyboardInterrupt, match="^stop$"), Foreign("it"):
        raise KeyboardInterrupt("stop")
    with Foreign("it"):
        pass
