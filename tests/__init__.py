from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of a pytest that a test starts: its plugins take 1 CPU second to load, and none is asked for there.
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
