from tests.support.lateness import nobody_is_late  # noqa: F401 - of all tests here
