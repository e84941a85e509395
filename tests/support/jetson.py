"""The files by which a Jetson says how it is."""

from __future__ import annotations

from pathlib import Path

ORIN = {
    "sys/devices/platform/gpu.0/load": "421\n",
    "proc/meminfo": "MemTotal:  7620840 kB\nMemAvailable:  3120000 kB\nNvMapMemUsed:  805068 kB\n"
    "HugePages_Total:  0\n",
    "proc/stat": "cpu  200 10 90 5000 40 0 5 0 7 0\ncpu0 100 5 45 2500 20 0 2 0 0 0\n"
    "cpu1 100 5 45 2500 20 0 3 0 7 0\nintr 1 2\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "51312\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "49500\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",  # off: reading it fails
    "sys/class/thermal/thermal_zone3/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone3/temp": "53000\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "3\n",
    "sys/class/thermal/cooling_device1/type": "cpu-throttle-alert\n",
    "sys/class/thermal/cooling_device1/cur_state": "0\n",
    "sys/class/thermal/cooling_device2/type": "gpu-throttle-alert\n",
    "sys/class/thermal/cooling_device2/cur_state": "1\n",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "1\n",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "37\n",
    "sys/class/hwmon/hwmon3/oc3_throt_en": "1\n",
    "var/lib/nvpmodel/status": "pmode:0001 fmode:fanNull\n",
    "etc/nvpmodel.conf": "# a comment\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n"
    "< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
    "< PM_CONFIG DEFAULT=1 >\n",
}


def laid_down(root: Path, files: dict[str, str]) -> Path:
    """As the kernel of JetPack 6 on an Orin has them."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "sys/class/thermal/thermal_zone2/temp").mkdir(parents=True, exist_ok=True)
    return root
