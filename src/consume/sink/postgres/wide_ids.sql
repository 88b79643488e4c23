-- Makes the ids of topics, origins and sets of keys bigint: as int there are 2,147,483,647 of each, and none is given twice.
-- Every table is written anew, with its indexes, and is locked meanwhile: it takes as much room again, and some 10 seconds
-- for a GiB. Views keep their owners, their options and who may read them. For the schema that search_path names first, as
-- the role that owns the tables or as a superuser.
DO $$
DECLARE
    remade text[];
    statement text;
BEGIN
    WITH views AS (
        SELECT c.* FROM pg_class c WHERE c.relkind = 'v'
            AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
            AND c.relname IN ('records', 'samples', 'latest', 'quarantine')),
    grants AS (
        SELECT v.oid, v.relname, v.relowner, g.grantee, g.is_grantable, g.privilege_type AS privilege
        FROM views v CROSS JOIN LATERAL aclexplode(v.relacl) g
        UNION ALL
        SELECT v.oid, v.relname, v.relowner, g.grantee, g.is_grantable, format('%s (%I)', g.privilege_type, a.attname)
        FROM views v JOIN pg_attribute a ON a.attrelid = v.oid CROSS JOIN LATERAL aclexplode(a.attacl) g),
    statements AS (
        SELECT 1 AS step, format('CREATE VIEW %I %s AS %s', relname,
            'WITH (' || array_to_string(reloptions, ', ') || ')', pg_get_viewdef(oid)) AS statement FROM views
        UNION ALL
        SELECT 2, format('ALTER VIEW %I OWNER TO %I', relname, pg_get_userbyid(relowner)) FROM views
        UNION ALL
        SELECT 3, format('GRANT %s ON %I TO %s', privilege, relname,
            CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END)
            || CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
        FROM grants WHERE grantee <> relowner)
    SELECT array_agg(s.statement ORDER BY s.step) INTO remade FROM statements s;
    DROP VIEW records, samples, latest, quarantine;
    ALTER TABLE topics ALTER COLUMN id TYPE bigint;
    ALTER TABLE origins ALTER COLUMN id TYPE bigint;
    ALTER TABLE key_sets ALTER COLUMN id TYPE bigint, ALTER COLUMN topic_id TYPE bigint;
    ALTER TABLE latest_values ALTER COLUMN topic_id TYPE bigint;
    ALTER TABLE entries ALTER COLUMN topic_id TYPE bigint, ALTER COLUMN origin_id TYPE bigint;
    ALTER TABLE quarantined ALTER COLUMN topic_id TYPE bigint, ALTER COLUMN origin_id TYPE bigint;
    ALTER TABLE sample_rows ALTER COLUMN topic_id TYPE bigint, ALTER COLUMN key_set_id TYPE bigint;
    ALTER TABLE withheld_samples ALTER COLUMN topic_id TYPE bigint, ALTER COLUMN key_set_id TYPE bigint;
    FOREACH statement IN ARRAY remade LOOP
        EXECUTE statement;
    END LOOP;
END $$;
