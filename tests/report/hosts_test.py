"""The table of a run's processes: what hosts.jsonl says of each, and nothing of a run of one."""

import json
import re

from retool_jax.core import metrics
from retool_jax.report import hosts, pages


def line(step, process, rollout_s, waiting_s, **values):
    return {
        'step': step, 'process': process, 'host': f'node<{process}>', 'rollout_s': rollout_s, 'sampled_tokens': 60,
        'tools_p99_s': 0.5, 'device_peak_mb': None, 'host_peak_mb': 1024.0, 'waiting_s': waiting_s,
    } | values  # fmt: skip


LINES = [
    line(0, 0, 2.0, 4.0),
    line(0, 1, 6.0, 0.0, device_peak_mb=512.0),
    line(1, 0, 4.0, 0.0, tools_p99_s=1.25),
    line(1, 1, 2.0, 2.0, device_peak_mb=2048.0, host_peak_mb=3072.0),
]


def rows(text):
    return [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in re.findall(r'<tr>(.*?)</tr>', text)]


def test_each_process_has_a_row_of_its_means_and_peaks():
    head, first, second = rows(hosts.section(LINES))
    assert head == list(hosts.HEAD)
    assert first == ['0', 'node&lt;0&gt;', '2', '3.0', '2.0', '1', '20', '1.25', '–', '1.0']
    assert second == ['1', 'node&lt;1&gt;', '2', '4.0', '1.0', '1', '15', '0.50', '2.0', '3.0']


def test_a_process_that_went_on_elsewhere_has_a_row_for_each_host():
    text = hosts.section([*LINES, line(2, 1, 1.0, 0.0, host='other')])
    assert [row[:3] for row in rows(text)[1:]] == [
        ['0', 'node&lt;0&gt;', '2'], ['1', 'node&lt;1&gt;', '2'], ['1', 'other', '1'],
    ]  # fmt: skip


def test_a_run_of_one_process_has_no_such_section():
    assert hosts.section([]) == '' and hosts.section(LINES[::2]) == ''
    assert hosts.section([LINES[0], LINES[2] | {'host': 'other'}]) == ''


def test_the_page_of_a_run_of_several_processes_holds_the_table(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "rewards/mean": 0.5}\n')
    assert '>Hosts</h2>' not in pages.write(tmp_path).read_text()
    (tmp_path / metrics.HOSTS).write_text(''.join(json.dumps(line) + '\n' for line in LINES))
    text = pages.write(tmp_path).read_text()
    assert '<section id="hosts"><h2>Hosts</h2>' in text and 'node&lt;1&gt;' in text
