"""What the catalogue says of schema ``siamese``, as text: to compare, and for golden lists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.conftest import Connection

GOLDEN = Path(__file__).resolve().parent / "golden"

# pgvector may be installed in the same schema.
_OWN = """NOT EXISTS (SELECT FROM pg_depend AS d JOIN pg_extension AS x ON x.oid = d.refobjid
    WHERE d.objid = o.oid AND d.deptype = 'e' AND x.extname = 'vector')"""
_ACL = """(SELECT string_agg(concat(coalesce(r.rolname, 'public'), '=', a.privilege_type), ', '
    ORDER BY r.rolname, a.privilege_type)
    FROM aclexplode({}) AS a LEFT JOIN pg_roles AS r ON r.oid = a.grantee)"""
_MEMBER = """(SELECT string_agg(d.deptype::text, '') FROM pg_depend AS d
    JOIN pg_extension AS x ON x.oid = d.refobjid
    WHERE d.classid = {}::regclass AND d.objid = o.oid AND d.objsubid = 0
        AND d.refclassid = 'pg_extension'::regclass AND x.extname = 'pg_siamese')"""
_INITIAL = (
    "(SELECT {} FROM pg_init_privs AS i WHERE i.classoid = {}::regclass AND i.objoid = o.oid)"
)

# Each gives rows of (what, definition).
QUERIES: Mapping[str, str] = {
    "schema": f"""
        SELECT 'schema', concat_ws(' | ', nspname, {_ACL.format("nspacl")}, obj_description(oid))
        FROM pg_namespace WHERE nspname = 'siamese'""",
    "extension": """
        SELECT 'extension', concat_ws(' | ', extversion, extrelocatable, extnamespace::regnamespace,
            (SELECT string_agg(concat(c.oid::regclass, x.condition), ', ' ORDER BY c.relname)
                FROM unnest(extconfig, extcondition) AS x (id, condition)
                JOIN pg_class AS c ON c.oid = x.id),
            obj_description(oid))
        FROM pg_extension WHERE extname = 'pg_siamese'""",
    "function": f"""
        SELECT concat('function ', o.oid::regprocedure), concat_ws(' | ', proowner::regrole,
            {_MEMBER.format("'pg_proc'")}, {_ACL.format("proacl")},
            {_INITIAL.format(_ACL.format("i.initprivs"), "'pg_proc'")},
            obj_description(oid), pg_get_functiondef(oid))
        FROM pg_proc AS o WHERE pronamespace = 'siamese'::regnamespace AND {_OWN}""",
    "relation": f"""
        SELECT concat('relation ', o.oid::regclass), concat_ws(' | ', relkind, relowner::regrole,
            relpersistence, relrowsecurity, relforcerowsecurity, reloptions::text,
            {_MEMBER.format("'pg_class'")}, {_ACL.format("relacl")},
            {_INITIAL.format(_ACL.format("i.initprivs"), "'pg_class'")},
            obj_description(oid, 'pg_class'), CASE WHEN relkind = 'v' THEN pg_get_viewdef(oid) END,
            CASE WHEN relkind = 'i' THEN pg_get_indexdef(oid) END)
        FROM pg_class AS o WHERE relnamespace = 'siamese'::regnamespace AND {_OWN}""",
    "column": f"""
        SELECT concat('column ', o.oid::regclass, '.', a.attname), concat_ws(' | ',
            row_number() OVER (PARTITION BY o.oid ORDER BY a.attnum),
            format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
            a.attstorage, a.attcollation::regcollation, a.attacl::text,
            pg_get_expr(d.adbin, d.adrelid), col_description(o.oid, a.attnum))
        FROM pg_class AS o JOIN pg_attribute AS a ON a.attrelid = o.oid
        LEFT JOIN pg_attrdef AS d ON d.adrelid = o.oid AND d.adnum = a.attnum
        WHERE relnamespace = 'siamese'::regnamespace AND relkind IN ('r', 'v', 'c') AND a.attnum > 0
            AND NOT a.attisdropped AND {_OWN}""",
    "type": f"""
        SELECT concat('type ', o.oid::regtype), concat_ws(' | ', typowner::regrole,
            {_MEMBER.format("'pg_type'")}, typlen, typalign, typstorage, typcategory, typinput,
            typoutput, typreceive, typsend, {_ACL.format("typacl")}, obj_description(oid))
        FROM pg_type AS o WHERE typnamespace = 'siamese'::regnamespace AND typtype = 'b'
            AND typelem = 0 AND {_OWN}""",
    "cast": f"""
        SELECT concat('cast ', castsource::regtype, ' as ', casttarget::regtype),
            concat_ws(' | ', castcontext, castmethod, {_MEMBER.format("'pg_cast'")})
        FROM pg_cast AS o JOIN pg_type AS t ON t.oid = o.casttarget
        WHERE t.typnamespace = 'siamese'::regnamespace AND t.typelem = 0 AND {_OWN}""",
    "constraint": """
        SELECT concat('constraint ', conrelid::regclass, '.', conname), concat_ws(' | ',
            pg_get_constraintdef(oid), convalidated, obj_description(oid))
        FROM pg_constraint WHERE connamespace = 'siamese'::regnamespace AND conrelid > 0
            AND contype <> 'n' -- from 18 on; the columns say it""",
    "sequence": """
        SELECT concat('sequence ', seqrelid::regclass), concat_ws(' | ', seqtypid::regtype,
            seqstart, seqincrement, seqmin, seqmax, seqcache, seqcycle)
        FROM pg_sequence AS s JOIN pg_class AS c ON c.oid = s.seqrelid
        WHERE relnamespace = 'siamese'::regnamespace""",
    "policy": """
        SELECT concat('policy ', polrelid::regclass, '.', polname), concat_ws(' | ', polcmd,
            polpermissive, polroles::text, pg_get_expr(polqual, polrelid),
            pg_get_expr(polwithcheck, polrelid), obj_description(p.oid))
        FROM pg_policy AS p JOIN pg_class AS c ON c.oid = polrelid
        WHERE relnamespace = 'siamese'::regnamespace""",
    "trigger": """
        SELECT concat('trigger ', tgrelid::regclass, '.', tgname), concat_ws(' | ',
            pg_get_triggerdef(oid), tgenabled, obj_description(oid))
        FROM pg_trigger WHERE NOT tgisinternal""",
}


def describe(db: Connection) -> dict[str, str]:
    """Every object of the schema, with all that there is to say of it."""
    result: dict[str, str] = {}
    db.execute("SET search_path = pg_catalog")
    for query in QUERIES.values():
        result |= dict(db.execute(query).fetchall())
    db.execute("RESET search_path")
    return result


def objects(db: Connection) -> list[str]:
    """Names of everything in the schema, with signatures and types; no bodies."""
    columns = db.execute(
        "SELECT concat('column ', c.oid::regclass, '.', a.attname, ' ',"
        " format_type(a.atttypid, a.atttypmod), CASE WHEN a.attnotnull THEN ' not null' END)"
        " FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid"
        " WHERE c.relnamespace = 'siamese'::regnamespace AND c.relkind IN ('r', 'v')"
        " AND a.attnum > 0 AND NOT a.attisdropped"
    ).fetchall()
    functions = db.execute(
        "SELECT concat('function ', oid::regprocedure, ' returns ', pg_get_function_result(oid),"
        " CASE WHEN prosecdef THEN ' security definer' END,"
        " CASE provolatile WHEN 'v' THEN ' volatile' WHEN 's' THEN ' stable' ELSE ' immutable' END)"
        f" FROM pg_proc AS o WHERE pronamespace = 'siamese'::regnamespace AND {_OWN}"
    ).fetchall()
    others = [
        name for name in describe(db) if not name.startswith(("column ", "function ", "schema"))
    ]
    return sorted([*others, *(row[0] for row in columns + functions)])


def privileges(db: Connection, labels: Mapping[str, str]) -> list[str]:
    """Who may do what, for the roles in ``labels`` (role to what the list calls it) and public."""
    lines = []
    for kind, column, catalog, name in (
        ("schema", "nspacl", "pg_namespace", "o.nspname::text"),
        ("function", "proacl", "pg_proc", "o.oid::regprocedure::text"),
        ("relation", "relacl", "pg_class", "o.oid::regclass::text"),
    ):
        where = {
            "schema": "o.nspname = 'siamese'",
            "function": f"o.pronamespace = 'siamese'::regnamespace AND {_OWN}",
            "relation": f"o.relnamespace = 'siamese'::regnamespace AND {_OWN}",
        }[kind]
        rows = db.execute(
            f"SELECT {name}, coalesce(r.rolname, 'public'),"
            " string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type)"
            f" FROM {catalog} AS o CROSS JOIN LATERAL aclexplode(coalesce(o.{column},"
            f" acldefault('{kind[0] if kind != 'schema' else 'n'}', o.{_owner(kind)}))) AS a"
            f" LEFT JOIN pg_roles AS r ON r.oid = a.grantee WHERE {where} GROUP BY 1, 2"
        ).fetchall()
        for item, role, granted in rows:
            if role == "public" or role in labels:
                lines.append(f"{labels.get(role, role)}: {kind} {item}: {granted.lower()}")
    return sorted(lines)


def _owner(kind: str) -> str:
    return {"schema": "nspowner", "function": "proowner", "relation": "relowner"}[kind]


def check_golden(name: str, lines: list[str], renew: bool) -> None:
    """Compare with a golden list, or write it anew (pytest --renew-golden)."""
    path = GOLDEN / f"{name}.txt"
    text = "".join(f"{line}\n" for line in lines)
    if renew:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert lines == path.read_text().splitlines(), "if it is meant: pytest --renew-golden"
