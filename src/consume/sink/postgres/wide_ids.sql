-- Makes the ids of topics, origins and sets of keys bigint: as int there are 2,147,483,647 of each, and none is given twice.
-- Every table is written anew, with its indexes, and is locked meanwhile: it takes as much room again, and some 10 seconds
-- for a GiB. Views keep who may read them. For the schema that search_path names first.
DO $$
DECLARE
    views text[];
    grants text[];
    statement text;
BEGIN
    SELECT array_agg(format('CREATE VIEW %I AS %s', c.relname, pg_get_viewdef(c.oid))) INTO views FROM pg_class c
    WHERE c.relnamespace = current_schema()::regnamespace AND c.relname IN ('records', 'samples', 'latest', 'quarantine');
    SELECT coalesce(array_agg(format('GRANT %s ON %I TO %s', a.privilege_type, c.relname,
        CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END)), '{}') INTO grants
    FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
    WHERE c.relnamespace = current_schema()::regnamespace AND c.relname IN ('records', 'samples', 'latest', 'quarantine')
        AND a.grantee <> c.relowner;
    DROP VIEW records, samples, latest, quarantine;
    ALTER TABLE topics ALTER COLUMN id TYPE bigint;
    ALTER TABLE origins ALTER COLUMN id TYPE bigint;
    ALTER TABLE key_sets ALTER COLUMN id TYPE bigint, ALTER COLUMN topic_id TYPE bigint;
    ALTER TABLE latest_values ALTER COLUMN topic_id TYPE bigint;
    ALTER TABLE entries ALTER COLUMN topic_id TYPE bigint, ALTER COLUMN origin_id TYPE bigint;
    ALTER TABLE quarantined ALTER COLUMN topic_id TYPE bigint, ALTER COLUMN origin_id TYPE bigint;
    ALTER TABLE sample_rows ALTER COLUMN topic_id TYPE bigint, ALTER COLUMN key_set_id TYPE bigint;
    ALTER TABLE withheld_samples ALTER COLUMN topic_id TYPE bigint, ALTER COLUMN key_set_id TYPE bigint;
    FOREACH statement IN ARRAY views || grants LOOP
        EXECUTE statement;
    END LOOP;
END $$;
