"""What all tests share: what is kept between runs goes to a folder of the tests' own."""

import pytest

from layerwise.layouts import CACHE


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("cache")))
        yield
