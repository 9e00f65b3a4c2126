"""Signed publication to a directory or a bucket, and verified reading from it."""

from filterpress.release.keys import create_keys as create_keys
from filterpress.release.repository import Release as Release
from filterpress.release.repository import fetch as fetch
from filterpress.release.repository import latest as latest
from filterpress.release.repository import publish as publish
from filterpress.release.repository import publish_network as publish_network
from filterpress.release.repository import refresh as refresh
