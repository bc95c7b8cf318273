"""The built site, made once for all workers of a run."""

import filelock
import pytest
import site_pages


@pytest.fixture(scope="session")
def folder(tmp_path_factory, worker_id):
    """Where the site's pages are."""
    pytest.importorskip("sphinx", reason="the site needs pip install '.[docs]'")
    shared = tmp_path_factory.getbasetemp()
    shared = shared if worker_id == "master" else shared.parent
    made = shared / "site"
    with filelock.FileLock(shared / "site.lock"):
        if not (made / "done").exists():
            site_pages.build(made)
            (made / "done").touch()
    return made / "html"
