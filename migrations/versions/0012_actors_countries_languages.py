"""actors, and the countries of ISO 3166-1 and languages of ISO 639-1

A client of an existing log sees the inserted rows, so they have their events (`add_bulk`) in that log. A new database
has no log yet: its first position comes after these rows.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
import sqlalchemy as sa
from alembic import op

from core.times import utc_text

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
DATE = sa.String(10).with_variant(sa.Date(), "postgresql")

# The English short names of ISO 3166-1, without articles.
COUNTRIES = """
AD Andorra; AE United Arab Emirates; AF Afghanistan; AG Antigua and Barbuda; AI Anguilla; AL Albania; AM Armenia;
AO Angola; AQ Antarctica; AR Argentina; AS American Samoa; AT Austria; AU Australia; AW Aruba; AX Åland Islands;
AZ Azerbaijan; BA Bosnia and Herzegovina; BB Barbados; BD Bangladesh; BE Belgium; BF Burkina Faso; BG Bulgaria;
BH Bahrain; BI Burundi; BJ Benin; BL Saint Barthélemy; BM Bermuda; BN Brunei Darussalam;
BO Bolivia (Plurinational State of); BQ Bonaire, Sint Eustatius and Saba; BR Brazil; BS Bahamas; BT Bhutan;
BV Bouvet Island; BW Botswana; BY Belarus; BZ Belize; CA Canada; CC Cocos (Keeling) Islands;
CD Congo (Democratic Republic of the); CF Central African Republic; CG Congo; CH Switzerland; CI Côte d'Ivoire;
CK Cook Islands; CL Chile; CM Cameroon; CN China; CO Colombia; CR Costa Rica; CU Cuba; CV Cabo Verde; CW Curaçao;
CX Christmas Island; CY Cyprus; CZ Czechia; DE Germany; DJ Djibouti; DK Denmark; DM Dominica; DO Dominican Republic;
DZ Algeria; EC Ecuador; EE Estonia; EG Egypt; EH Western Sahara; ER Eritrea; ES Spain; ET Ethiopia; FI Finland; FJ Fiji;
FK Falkland Islands (Malvinas); FM Micronesia (Federated States of); FO Faroe Islands; FR France; GA Gabon;
GB United Kingdom of Great Britain and Northern Ireland; GD Grenada; GE Georgia; GF French Guiana; GG Guernsey;
GH Ghana; GI Gibraltar; GL Greenland; GM Gambia; GN Guinea; GP Guadeloupe; GQ Equatorial Guinea; GR Greece;
GS South Georgia and the South Sandwich Islands; GT Guatemala; GU Guam; GW Guinea-Bissau; GY Guyana; HK Hong Kong;
HM Heard Island and McDonald Islands; HN Honduras; HR Croatia; HT Haiti; HU Hungary; ID Indonesia; IE Ireland;
IL Israel; IM Isle of Man; IN India; IO British Indian Ocean Territory; IQ Iraq; IR Iran (Islamic Republic of);
IS Iceland; IT Italy; JE Jersey; JM Jamaica; JO Jordan; JP Japan; KE Kenya; KG Kyrgyzstan; KH Cambodia; KI Kiribati;
KM Comoros; KN Saint Kitts and Nevis; KP Korea (Democratic People's Republic of); KR Korea (Republic of); KW Kuwait;
KY Cayman Islands; KZ Kazakhstan; LA Lao People's Democratic Republic; LB Lebanon; LC Saint Lucia; LI Liechtenstein;
LK Sri Lanka; LR Liberia; LS Lesotho; LT Lithuania; LU Luxembourg; LV Latvia; LY Libya; MA Morocco; MC Monaco;
MD Moldova (Republic of); ME Montenegro; MF Saint Martin (French part); MG Madagascar; MH Marshall Islands;
MK North Macedonia; ML Mali; MM Myanmar; MN Mongolia; MO Macao; MP Northern Mariana Islands; MQ Martinique;
MR Mauritania; MS Montserrat; MT Malta; MU Mauritius; MV Maldives; MW Malawi; MX Mexico; MY Malaysia; MZ Mozambique;
NA Namibia; NC New Caledonia; NE Niger; NF Norfolk Island; NG Nigeria; NI Nicaragua; NL Netherlands (Kingdom of the);
NO Norway; NP Nepal; NR Nauru; NU Niue; NZ New Zealand; OM Oman; PA Panama; PE Peru; PF French Polynesia;
PG Papua New Guinea; PH Philippines; PK Pakistan; PL Poland; PM Saint Pierre and Miquelon; PN Pitcairn; PR Puerto Rico;
PS Palestine, State of; PT Portugal; PW Palau; PY Paraguay; QA Qatar; RE Réunion; RO Romania; RS Serbia;
RU Russian Federation; RW Rwanda; SA Saudi Arabia; SB Solomon Islands; SC Seychelles; SD Sudan; SE Sweden; SG Singapore;
SH Saint Helena, Ascension and Tristan da Cunha; SI Slovenia; SJ Svalbard and Jan Mayen; SK Slovakia; SL Sierra Leone;
SM San Marino; SN Senegal; SO Somalia; SR Suriname; SS South Sudan; ST Sao Tome and Principe; SV El Salvador;
SX Sint Maarten (Dutch part); SY Syrian Arab Republic; SZ Eswatini; TC Turks and Caicos Islands; TD Chad;
TF French Southern Territories; TG Togo; TH Thailand; TJ Tajikistan; TK Tokelau; TL Timor-Leste; TM Turkmenistan;
TN Tunisia; TO Tonga; TR Türkiye; TT Trinidad and Tobago; TV Tuvalu; TW Taiwan (Province of China);
TZ Tanzania (United Republic of); UA Ukraine; UG Uganda; UM United States Minor Outlying Islands;
US United States of America; UY Uruguay; UZ Uzbekistan; VA Holy See; VC Saint Vincent and the Grenadines;
VE Venezuela (Bolivarian Republic of); VG Virgin Islands (British); VI Virgin Islands (U.S.); VN Viet Nam; VU Vanuatu;
WF Wallis and Futuna; WS Samoa; YE Yemen; YT Mayotte; ZA South Africa; ZM Zambia; ZW Zimbabwe
"""

# The English names of ISO 639-1, one for each language.
LANGUAGES = """
aa Afar; ab Abkhazian; ae Avestan; af Afrikaans; ak Akan; am Amharic; an Aragonese; ar Arabic; as Assamese; av Avaric;
ay Aymara; az Azerbaijani; ba Bashkir; be Belarusian; bg Bulgarian; bi Bislama; bm Bambara; bn Bengali; bo Tibetan;
br Breton; bs Bosnian; ca Catalan; ce Chechen; ch Chamorro; co Corsican; cr Cree; cs Czech; cu Church Slavic;
cv Chuvash; cy Welsh; da Danish; de German; dv Divehi; dz Dzongkha; ee Ewe; el Greek; en English; eo Esperanto;
es Spanish; et Estonian; eu Basque; fa Persian; ff Fulah; fi Finnish; fj Fijian; fo Faroese; fr French;
fy Western Frisian; ga Irish; gd Scottish Gaelic; gl Galician; gn Guarani; gu Gujarati; gv Manx; ha Hausa; he Hebrew;
hi Hindi; ho Hiri Motu; hr Croatian; ht Haitian; hu Hungarian; hy Armenian; hz Herero; ia Interlingua; id Indonesian;
ie Interlingue; ig Igbo; ii Sichuan Yi; ik Inupiaq; io Ido; is Icelandic; it Italian; iu Inuktitut; ja Japanese;
jv Javanese; ka Georgian; kg Kongo; ki Kikuyu; kj Kuanyama; kk Kazakh; kl Kalaallisut; km Khmer; kn Kannada; ko Korean;
kr Kanuri; ks Kashmiri; ku Kurdish; kv Komi; kw Cornish; ky Kyrgyz; la Latin; lb Luxembourgish; lg Ganda; li Limburgish;
ln Lingala; lo Lao; lt Lithuanian; lu Luba-Katanga; lv Latvian; mg Malagasy; mh Marshallese; mi Maori; mk Macedonian;
ml Malayalam; mn Mongolian; mr Marathi; ms Malay; mt Maltese; my Burmese; na Nauru; nb Norwegian Bokmål;
nd North Ndebele; ne Nepali; ng Ndonga; nl Dutch; nn Norwegian Nynorsk; no Norwegian; nr South Ndebele; nv Navajo;
ny Chichewa; oc Occitan; oj Ojibwa; om Oromo; or Oriya; os Ossetian; pa Punjabi; pi Pali; pl Polish; ps Pashto;
pt Portuguese; qu Quechua; rm Romansh; rn Rundi; ro Romanian; ru Russian; rw Kinyarwanda; sa Sanskrit; sc Sardinian;
sd Sindhi; se Northern Sami; sg Sango; si Sinhala; sk Slovak; sl Slovenian; sm Samoan; sn Shona; so Somali; sq Albanian;
sr Serbian; ss Swati; st Southern Sotho; su Sundanese; sv Swedish; sw Swahili; ta Tamil; te Telugu; tg Tajik; th Thai;
ti Tigrinya; tk Turkmen; tl Tagalog; tn Tswana; to Tonga; tr Turkish; ts Tsonga; tt Tatar; tw Twi; ty Tahitian;
ug Uyghur; uk Ukrainian; ur Urdu; uz Uzbek; ve Venda; vi Vietnamese; vo Volapük; wa Walloon; wo Wolof; xh Xhosa;
yi Yiddish; yo Yoruba; za Zhuang; zh Chinese; zu Zulu
"""


def _text(length: int | None = None) -> sa.types.TypeEngine[Any]:
    if length is None:
        return sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    _create(
        "actors",
        sa.Column("name", _text(100), nullable=False),
        sa.Column("birth_date", DATE, nullable=True),
        sa.Column("country", _text(2), nullable=True),
        sa.Column("biography", _text(), nullable=True),
    )
    now = datetime.now(UTC)
    payloads = {}
    for name, listed in (("countries", COUNTRIES), ("languages", LANGUAGES)):
        _create(
            name,
            sa.Column("code", _text(2), nullable=False),
            sa.Column("code_key", _text(200), nullable=False),
            sa.Column("name", _text(100), nullable=False),
            sa.UniqueConstraint("code_key", name=op.f(f"uq_{name}_code_key")),
        )
        payloads[name] = _insert(name, listed, now)
    _append(payloads, now)


def _create(name: str, *columns: sa.schema.SchemaItem) -> None:
    op.create_table(
        name,
        sa.Column("id", ID, autoincrement=True, nullable=False),
        *columns,
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{name}")),
        sqlite_autoincrement=True,
    )


def _stored(moment: datetime) -> Any:
    return utc_text(moment) if op.get_bind().dialect.name == "sqlite" else moment


def _insert(name: str, listed: str, now: datetime) -> bytes:
    """Insert a row for each code, and return the payload of the event."""
    bind = op.get_bind()
    table = sa.table(name, *map(sa.column, ("id", "code", "code_key", "name", "version", "created_at", "updated_at")))
    pairs = [pair.strip().split(" ", 1) for pair in listed.replace("\n", " ").split(";")]
    times = dict.fromkeys(("created_at", "updated_at"), _stored(now))
    bind.execute(
        table.insert(),
        [{"code": code, "code_key": code.lower(), "name": each, "version": 1, **times} for code, each in pairs],
    )
    shown = dict.fromkeys(("created_at", "updated_at"), utc_text(now))
    found = bind.execute(sa.select(table.c.id, table.c.code, table.c.name).order_by(table.c.id)).all()
    items = [{"id": id_, "code": code, "name": each, "version": 1, **shown} for id_, code, each in found]
    return orjson.dumps({"count": len(items), "items": items})


def _append(payloads: dict[str, bytes], now: datetime) -> None:
    """Number and insert an event for each payload, as `repository.engine.append` does for other writes."""
    bind = op.get_bind()
    take = sa.text("UPDATE event_head SET seq = seq + :count, size = size + :size WHERE id = 1 RETURNING seq")
    size = sum(map(len, payloads.values()))
    last = bind.execute(take, {"count": len(payloads), "size": size}).scalar_one_or_none()
    if last is None:
        return
    names = ("seq", "topic", "operation", "audience", "payload", "created_at")
    rest = {"operation": "add_bulk", "audience": "public", "created_at": _stored(now)}
    rows = [
        {"seq": seq, "topic": topic, "payload": payload, **rest}
        for seq, (topic, payload) in enumerate(payloads.items(), last - len(payloads) + 1)
    ]
    bind.execute(sa.table("events", *map(sa.column, names)).insert(), rows)


def downgrade() -> None:
    for name in ("languages", "countries", "actors"):
        op.drop_table(name)
