"""Where the app and its cluster listen."""

import pytest

from ci.common import run


@pytest.mark.section("Keep the deployment in a file")
def test_app_of_the_config_file_listens_on_loopback_only(served, quoted):
    quoted("... replicas that have taken more than ... to initialize.", served)
    sockets = [line.split()[3].rpartition(":") for line in run("ss", "-ltnH").stdout.splitlines()]
    addresses = {address for address, _, port in sockets if port == "8000" or 30000 <= int(port) <= 31000}
    assert addresses == {"127.0.0.1"}, sockets
    everywhere = {port for address, _, port in sockets if address in ("0.0.0.0", "*", "[::]")}
    assert {"8404", "9101", "8080", "44217", "44227"} <= everywhere, "The text says that metrics listen everywhere"
