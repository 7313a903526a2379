"""Tests of the Ray executor: the bytes of one process, whatever workers and machines do meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import gaussian_table
from test_stages import CONFIG, N, _no_figures, check_same, local, run_stages  # noqa: F401

from mmaudit.audit.engine.executors import RayConfig, RayOptions
from mmaudit.audit.engine.plan import PartsConfig
from mmaudit.cli.scoring import score

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
