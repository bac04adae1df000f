"""Configuration: flags over environment over file over a command's own defaults."""

from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

from flowsage.collector.errors import ConfigurationError
from flowsage.pipelines.config import load


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "flowsage.toml"
    path.write_text(text)
    return path


def test_a_flag_wins_over_the_environment_which_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, '[windows]\nwindow = "30s"\npane = "3s"\n[sensor]\nidle_timeout = 7\n')
    monkeypatch.setenv("FLOWSAGE_WINDOWS__PANE", "2s")
    monkeypatch.setenv("FLOWSAGE_SENSOR__INTERFACES", "eth0,eth1")
    settings = load(path, {"windows": {"window": "20s"}}, defaults={"sensor": {"linger": "5s", "idle_timeout": "9s"}})
    assert settings.windows.window == 20 * 10**9
    assert settings.windows.pane == 2 * 10**9
    assert settings.sensor.idle_timeout == 7 * 10**9
    assert settings.sensor.linger == 5 * 10**9
    assert settings.sensor.interfaces == ("eth0", "eth1")


def test_what_is_shown_as_configuration_is_read_back_as_the_same(tmp_path: Path) -> None:
    settings = load(flags={"sensor": {"interfaces": ["eth0"], "name": 'a "b"'}, "windows": {"lateness": "250ms"}})
    assert load(write(tmp_path, settings.to_toml())) == settings


def test_the_file_is_found_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWSAGE_CONFIG", str(write(tmp_path, "[model]\nseed = 7\n")))
    assert load().model.seed == 7


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[sensor]\nidle_timout = 3\n",
            r"unknown configuration key 'sensor.idle_timout'.*did you mean 'sensor.idle_timeout'",
        ),
        ("[snesor]\n", "unknown configuration key 'snesor'.*did you mean 'sensor'"),
        ('[sensor]\nidle_timeout = "3 parsecs"\n', "sensor.idle_timeout.*'3 parsecs' is not of the form"),
        ("[metrics]\nport = 99999\n", "metrics.port.*less than 65536"),
        ("[alarms]\nbudget = 0\n", "alarms.budget.*greater than 0"),
        ("[sensor\n", "is not valid TOML"),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence_that_names_it(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence) as caught:
        load(write(tmp_path, text))
    assert caught.value.exit_code == 78
    assert "\n" not in str(caught.value)


def test_an_unknown_variable_with_our_prefix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWSAGE_IDLE_TIMEOUT", "3s")
    with pytest.raises(ConfigurationError, match="FLOWSAGE_IDLE_TIMEOUT names no configuration key"):
        load()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent.toml: No such file"):
        load(tmp_path / "absent.toml")


KAFKA = """
[kafka]
bootstrap_servers = ["kafka1:9093", "kafka2:9093"]
security_protocol = "SASL_SSL"
sasl_mechanism = "SCRAM-SHA-512"
sasl_plain_username = "sensor"
sasl_plain_password = "h1dden"
ssl_cafile = "/etc/ca.pem"
ssl_check_hostname = false
"""


def test_kafka_settings_pass_through_under_kafka_pythons_own_names_and_secrets_show_nowhere(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(KAFKA)
    settings = load(tmp_path / "c.toml")
    client = settings.kafka.client()
    assert client["sasl_plain_password"] == "h1dden"
    assert client["bootstrap_servers"] == ["kafka1:9093", "kafka2:9093"]
    assert client["ssl_check_hostname"] is False
    assert set(client) <= set(KafkaProducer.DEFAULT_CONFIG) & set(KafkaConsumer.DEFAULT_CONFIG)
    assert set(client) <= set(KafkaAdminClient.DEFAULT_CONFIG)
    assert "ssl_keyfile" not in client, "what is not set is left to kafka-python"
    for text in (settings.to_toml(), str(settings), repr(client), f"{settings.kafka!r}"):
        assert "h1dden" not in text
        assert "sensor" in text


def test_secrets_and_key_files_come_as_credentials_of_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for name, text in {"kafka.sasl_plain_password": "s3cret\n", "kafka.ssl_keyfile": "a key", "else": "other"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "kafka.prefix").write_text("no secret")
    kafka = load(write(tmp_path, '[kafka]\nsasl_plain_password = "old"\nprefix = "mine"\n')).kafka
    assert kafka.sasl_plain_password.get_secret_value() == "s3cret"
    assert kafka.ssl_keyfile == str(tmp_path / "kafka.ssl_keyfile")
    assert kafka.prefix == "mine"
    monkeypatch.setenv("FLOWSAGE_KAFKA__SASL_PLAIN_PASSWORD", "newer")
    assert load().kafka.sasl_plain_password.get_secret_value() == "newer"


def test_a_wrong_secret_is_named_and_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[kafka]\nsasl_plain_password = ['h1dden']\n")
    with pytest.raises(ConfigurationError, match=r"kafka\.sasl_plain_password") as error:
        load(tmp_path / "c.toml")
    assert "h1dden" not in str(error.value)
    (tmp_path / "c.toml").write_text("[kafka]\nsasl_plain_pasword = 'h1dden'\n")
    with pytest.raises(ConfigurationError, match=r"did you mean 'kafka\.sasl_plain_password'") as error:
        load(tmp_path / "c.toml")
    assert "h1dden" not in str(error.value)
    monkeypatch.setenv("FLOWSAGE_KAFKA__SASL_PLAIN_PASSWORD", "h1dden")
    assert load().kafka.client()["sasl_plain_password"] == "h1dden"
