import pytest

from stallscope.probes import catalogue
from stallscope.probes.catalogue import ClientLayout, Decoder
from stallscope.tracer.errors import SymbolError

DEFAULTS = [
    "serverCron",
    "clientsCron",
    "clientsCronResizeQueryBuffer",
    "sdsRemoveFreeSpace",
    "je_pages_purge",
]


def test_default_functions_in_catalogue_order():
    assert catalogue.default_functions() == DEFAULTS


def test_cron_functions_are_standing_and_per_client_ones_are_not():
    functions = catalogue.functions()
    tiers = {
        "serverCron": "standing",
        "clientsCron": "standing",
        "clientsCronResizeQueryBuffer": "detail",
        "sdsRemoveFreeSpace": "detail",
        "je_pages_purge": "detail",
        "freeClient": "detail",
        "acceptTcpHandler": "detail",
    }
    assert {name: functions[name].tier for name in tiers} == tiers


def test_expected_callers_are_catalogued_or_known_symbols():
    for function in catalogue.functions().values():
        for caller in function.callers:
            assert caller in catalogue.functions() or caller == "beforeSleep"
        for symbol in function.symbols:
            for inner in symbol.wraps:
                assert inner in {one.name for one in function.symbols}


def test_every_entry_says_what_it_does_and_where_that_was_looked_up():
    for function in catalogue.functions().values():
        assert function.summary
        assert function.source
        assert len({symbol.name for symbol in function.symbols}) == len(function.symbols)


def test_decoders_fit_the_three_slots():
    for function in catalogue.functions().values():
        for version in ((2, 8, 17), (3, 2, 6), (7, 0, 15)):
            decoder = catalogue.decoder_for(function, version)
            params = {"none": 0, "result": 0, "registers": 3, "sdshdr": 1, "sds": 1, "client": 6}
            assert len(decoder.params) == params[decoder.kind]
            for field in decoder.fields:
                assert 0 <= field.slot <= 2
                assert 0 <= field.shift <= field.shift + field.bits <= 64


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("7.0.15", (7, 0, 15)),
        ("v=6.2.14", (6, 2, 14)),
        ("valkey 8.0.1", (8, 0, 1)),
        ("7.4-rc2", (7, 4)),
        ("", ()),
        (None, ()),
        ("unstable", ()),
        ("9" * 5000, ()),
    ],
)
def test_parse_version(text, version):
    assert catalogue.parse_version(text) == version


@pytest.mark.parametrize(
    ("version", "since", "until", "is_within"),
    [
        ((7, 0, 15), "", "7.0", True),
        ((7, 2, 0), "", "7.0", False),
        ((6, 2, 14), "7.0", "", False),
        ((2, 8, 11), "2.6.9", "2.8.11", True),
        ((2, 8, 12), "2.6.9", "2.8.11", False),
        ((7, 0), "7.0", "7.0", True),
    ],
)
def test_within_is_inclusive(version, since, until, is_within):
    assert catalogue.within(version, since, until) is is_within


def test_strings_of_3_0_and_3_2_have_different_headers():
    trim = catalogue.functions()["sdsRemoveFreeSpace"]
    assert catalogue.decoder_for(trim, (3, 0, 7)).kind == "sdshdr"
    assert catalogue.decoder_for(trim, (3, 2, 0)).kind == "sds"
    assert [field.name for field in catalogue.decoder_for(trim, (3, 2, 0)).fields] == [
        "length_bytes",
        "free_bytes",
    ]


def test_nothing_is_decoded_when_the_release_is_not_known():
    for name in ("sdsRemoveFreeSpace", "clientsCronResizeQueryBuffer"):
        assert catalogue.decoder_for(catalogue.functions()[name], ()) == catalogue.NO_DECODER


def test_je_pages_purge_reads_its_second_argument_in_every_release():
    for version in ((), (2, 8, 17), (7, 0, 15)):
        decoder = catalogue.decoder_for(catalogue.functions()["je_pages_purge"], version)
        assert (decoder.kind, decoder.params) == ("registers", (2, 0, 0))
        assert [(field.name, field.unit, field.slot) for field in decoder.fields] == [("purged_bytes", "bytes", 0)]


@pytest.mark.parametrize(
    ("version", "params"),
    [
        ((2, 8, 11), (1, 0, 4, 32, 128, 0)),
        ((2, 8, 17), (1, 8, 4, 40, 136, 0)),
        ((3, 2, 6), (1, 8, 4, 40, 136, 1)),
        ((4, 0, 9), (1, 8, 4, 32, 136, 1)),
        ((5, 0, 6), (1, 8, 4, 32, 144, 1)),
        ((6, 0, 16), (1, 0, 8, 40, 168, 1)),
        ((6, 2, 14), (1, 0, 8, 40, 200, 1)),
        ((7, 0, 15), (1, 0, 8, 48, 224, 1)),
        ((7, 4, 1), (1, 0, 8, 64, 240, 1)),
    ],
)
def test_client_offsets_by_release(version, params):
    decoder = catalogue.decoder_for(catalogue.functions()["clientsCronResizeQueryBuffer"], version)
    assert (decoder.kind, decoder.params) == ("client", params)


def test_client_is_named_by_descriptor_up_to_5_and_by_id_from_6():
    function = catalogue.functions()["freeClient"]
    assert [field.name for field in catalogue.decoder_for(function, (5, 0, 6)).fields] == [
        "fd",
        "last_interaction_s",
        "allocated_bytes",
        "free_bytes",
    ]
    assert catalogue.decoder_for(function, (6, 0, 1)).fields[0].name == "client_id"


def test_offsets_of_a_release_not_looked_up_are_not_guessed():
    assert catalogue.client_layout((9, 1, 0)) is None
    assert catalogue.decoder_for(catalogue.functions()["freeClient"], (9, 1, 0)).kind == "none"


def test_offsets_from_debug_information_win_over_the_table():
    layout = ClientLayout(16, 8, 96, -1)
    decoder = catalogue.decoder_for(catalogue.functions()["freeClient"], (9, 1, 0), layout=layout)
    assert decoder.params == (1, 16, 8, 96, -1, 1)
    assert "last_interaction_s" not in [field.name for field in decoder.fields]


def test_valkey_has_its_own_releases():
    functions = catalogue.functions()
    assert catalogue.decoder_for(functions["freeClient"], (8, 0, 1), server="valkey").params[4] == 280
    assert catalogue.names_in(functions["redisFork"], (8, 0, 1), server="valkey") == [
        "redisFork",
        "serverFork",
        "fork",
    ]
    assert "serverFork" not in catalogue.names_in(functions["redisFork"], (7, 4, 0))


def test_names_by_release():
    accept = catalogue.functions()["acceptTcpHandler"]
    assert catalogue.names_in(accept, (7, 0, 15)) == ["acceptTcpHandler"]
    assert catalogue.names_in(accept, (7, 2, 5)) == ["connSocketAcceptHandler"]
    assert len(catalogue.names_in(accept, ())) == 2


def test_an_alias_asked_for_means_that_symbol_only():
    function = catalogue.lookup("sdsResize")
    assert function is not None
    assert [symbol.name for symbol in function.symbols] == ["sdsResize"]
    assert catalogue.decoder_for(function, (7, 0, 15)).kind == "sds"


def test_names_the_catalogue_does_not_have():
    assert catalogue.lookup("hi_sdsRemoveFreeSpace") is None
    assert catalogue.lookup("madvise") is None


@pytest.mark.parametrize(
    "text",
    [
        "not toml [",
        "a = 1",
        "[[function]]\nname = 'x'",
        "[[function]]\nname='x'\nsummary=''\nthread='half'\ntier='detail'\ndefault=true\ncallers=[]\nsource=''\nsymbols=[]",
        "[[function]]\nname='x'\nsummary=''\nthread='any'\ntier='detail'\ndefault=true\ncallers=[]\nsource=''\n"
        "symbols=[{name='x', library='libfoo'}]",
        "function=[]\nclient_layout=[{since='1', until='2', id=[1], querybuf=1, last_interaction=1}]",
    ],
)
def test_a_damaged_catalogue_is_one_line(text):
    with pytest.raises(SymbolError) as caught:
        catalogue.parse(text)
    assert "\n" not in str(caught.value).strip()


def test_no_decoder_is_the_empty_one():
    assert Decoder("none") == catalogue.NO_DECODER
