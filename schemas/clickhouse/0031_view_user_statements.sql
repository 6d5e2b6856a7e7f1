-- The lines of the users' accounts, in the order of their posting.
CREATE OR REPLACE VIEW {database}.user_statements
AS SELECT
    substring(account, length('user/') + 1) AS user_id,
    *
FROM {database}.account_statements
WHERE startsWith(account, 'user/')
ORDER BY account, seq
COMMENT 'Lines of the users\' accounts in service microseconds; the minutes are rounded, for people'
